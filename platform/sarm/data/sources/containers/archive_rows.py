"""Rows of files in a .tar, plain or packed, or in a .zip. A damaged member costs its own rows."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from sarm.data.sources.containers.damage import DAMAGE
from sarm.data.sources.containers.packing import ChunkFile, chunks_of, packing_of
from sarm.data.sources.rows import Reject, Row

ReadMember = Callable[[str, str, IO[bytes]], "Iterator[Row | Reject] | None"]
# These `tarfile` cannot unpack itself.
_UNPACKED_HERE = (".zst", ".lz4")


def tar_rows(path: Path, columns: Sequence[str] | None, read: ReadMember) -> Iterator[Row | Reject]:
    """The rows of all members that `read` (where, name, file) reads, as OpenWebText2 ships."""
    with path.open("rb") as file:
        unpacks = packing_of(path.name) in _UNPACKED_HERE
        stream = io.BufferedReader(ChunkFile(chunks_of(path.name, file))) if unpacks else file
        with tarfile.open(fileobj=stream, mode="r|" if unpacks else "r:*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                opened = archive.extractfile(member)
                assert opened is not None
                yield from _member_rows(f"{path}:{member.name}", member.name, opened, read)


def zip_rows(path: Path, columns: Sequence[str] | None, read: ReadMember) -> Iterator[Row | Reject]:
    """The same of a .zip, whose members may not be encrypted."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            where = f"{path}:{member.filename}"
            if member.is_dir():
                continue
            if member.flag_bits & 1:
                yield Reject("encrypted", where)
                continue
            try:
                with archive.open(member) as opened:
                    yield from _member_rows(where, member.filename, opened, read)
            except (*DAMAGE, NotImplementedError):
                yield Reject("corrupt_file", where)


def _member_rows(where: str, name: str, file: IO[bytes], read: ReadMember) -> Iterator[Row | Reject]:
    try:
        yield from read(where, name, file) or ()
    except DAMAGE:
        yield Reject("corrupt_file", where)
