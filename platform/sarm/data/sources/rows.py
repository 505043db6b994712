"""Rows out of files and data sets: JSONL (plain, .gz, .zst, or in a .tar), Parquet and Hugging Face data sets, always as a stream.

What is wrong with one row is a `Reject`, a value that the reader counts; what is wrong with a source is a UserError.
"""

import glob
import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.data.sources.extension_types import names_extension_type
from sarm.settings.checks import UserError

CHUNK_BYTES = 1 << 16
BATCH_ROWS = 512
_DAMAGE = (OSError, EOFError, zlib.error, pa.ArrowException, tarfile.TarError)
# A whole chunk is unpacked at once, up to 30,000 times its size, so this bounds the memory that a hostile file can take.
ZSTD_CHUNK_BYTES = 1 << 10
# A row is held in memory whole.
MAX_LINE_BYTES = 1 << 26


class Reject(NamedTuple):
    """A row that cannot be used: a reason word to count by, and where the row is."""

    reason: str
    where: str


class FileFormat(NamedTuple):
    """How files of one extension are read: `rows` takes the path, and the columns that are wanted where a file has columns."""

    rows: "Callable[[Path, Sequence[str] | None], Iterator[Row | Reject]]"
    unpacked: float
    """Bytes of rows that a byte of a file holds, about."""


class Row(NamedTuple):
    """A row as read, and where it is."""

    fields: dict[str, Any]
    where: str


def is_data_set(spec: str) -> bool:
    """Whether the source is a Hugging Face data set, `hf:NAME[:SPLIT]`."""
    return spec.startswith("hf:")


def source_files(spec: str, made_in_code: Collection[str]) -> list[Path]:
    """The files of a path or glob, sorted; empty for `hf:` and for the sources in `made_in_code`.

    Raises UserError for a missing file, a glob without match, an unknown extension or an unknown scheme.
    """
    if spec in made_in_code:
        return []
    if is_data_set(spec):
        if not re.fullmatch(r"hf:[\w.-]+(/[\w.-]+)?(:[^:]+)?", spec):
            raise UserError(f"{spec} is not a data set. Write hf:NAME or hf:NAME:SPLIT.")
        return []
    path = Path(spec).expanduser()
    # Two letters at least: `C:\data.jsonl` has a drive, not a scheme.
    if not path.exists() and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", spec):
        raise UserError(
            f"unknown source {spec}. Pass a path or glob of {', '.join(EXTENSIONS)}, hf:NAME[:SPLIT] or one of {', '.join(made_in_code)}."
        )
    if path.is_dir():
        raise UserError(f"{spec} is a folder. Pass its files, e.g. {spec.rstrip('/')}/*.jsonl.zst.")
    if path.exists():
        files = [path]
    elif files := [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]:
        pass
    elif glob.has_magic(spec):
        raise UserError(f"no file matches {spec}. Check the pattern; quote it so that the shell leaves it alone.")
    else:
        raise UserError(f"no file {spec}. {_neighbours(path)}")
    for file in files:
        if not file.name.endswith(EXTENSIONS):
            raise UserError(f"{file} has an unknown extension. The known ones are {', '.join(EXTENSIONS)}.")
    return files


def _neighbours(path: Path) -> str:
    """What a user who mistyped a path may have meant."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either."
    names = sorted(p.name for p in path.parent.iterdir() if p.name.endswith(EXTENSIONS))
    return f"{path.parent} holds {', '.join(names[:5]) or 'no data file'}{' ...' if len(names) > 5 else ''}."


def parquet_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file.

    Raises UserError if the file is empty, truncated or no Parquet, or has a column of an extension type.
    """
    try:
        if names_extension_type(path):
            raise UserError(
                f"{path} has a column of an extension type, which may hold code. Write it again with plain columns."
            )
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as Parquet: empty, truncated or something else. Copy it again."
        ) from error


def file_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row | Reject]:
    """The rows of one file in order; `columns` limits what is read from Parquet.

    Of a file that breaks off or is damaged the rows before are kept, then one reject `corrupt_file` closes the stream.
    """
    try:
        yield from format_of(path).rows(path, columns)
    except _DAMAGE:
        yield Reject("corrupt_file", str(path))


def format_of(path: Path) -> FileFormat:
    """The format of a file whose extension is known."""
    return next(known for extension, known in FORMATS.items() if path.name.endswith(extension))


def data_set_rows(spec: str) -> Iterator[Row | Reject]:
    """The rows of `hf:NAME[:SPLIT]` (split `train` unless told), streamed.

    Raises UserError with the library's reason if the data set cannot be opened or read.
    """
    from datasets import load_dataset

    _, name, *split = spec.split(":")
    try:
        data_set = load_dataset(name, split=split[0] if split else "train", streaming=True)
        for number, fields in enumerate(data_set):
            yield Row(fields, f"{spec} row {number}")
    # The library and the network beneath it raise dozens of kinds; all mean the same to the user.
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"{spec} cannot be read ({type(error).__name__}: {reason}). Check the name, the split and the connection."
        ) from error


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row | Reject]:
    number = 0
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns) if columns is not None else None):
            try:
                rows: list[dict[str, Any] | None] = list(batch.to_pylist())
            except UnicodeDecodeError:
                rows = [_decoded(batch.slice(i, 1)) for i in range(batch.num_rows)]
            for fields in rows:
                where = f"{path} row {number}"
                number += 1
                yield Reject("invalid_utf8", where) if fields is None else Row(fields, where)


def _decoded(one_row: pa.RecordBatch) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = one_row.to_pylist()[0]
        return row
    except UnicodeDecodeError:
        return None


def _tar_rows(path: Path, _: Sequence[str] | None) -> Iterator[Row | Reject]:
    """The rows of all files of lines in an archive, as OpenWebText2 ships; a damaged one costs its own rows."""
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if not (member.isfile() and member.name.endswith(tuple(_CHUNKS))):
                continue
            where = f"{path}:{member.name}"
            try:
                file = archive.extractfile(member)
                assert file is not None
                yield from _jsonl_rows(where, file)
            except _DAMAGE:
                yield Reject("corrupt_file", where)


def _line_rows(path: Path, _: Sequence[str] | None) -> Iterator[Row | Reject]:
    with path.open("rb") as file:
        yield from _jsonl_rows(str(path), file)


def _jsonl_rows(name: str, file: IO[bytes]) -> Iterator[Row | Reject]:
    chunks = next(chunks for extension, chunks in _CHUNKS.items() if name.endswith(extension))
    for number, line in enumerate(_lines(chunks(file)), start=1):
        where = f"{name}:{number}"
        if line is None:
            yield Reject("line_too_long", where)
            continue
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield Reject("invalid_utf8", where)
        except (ValueError, RecursionError):
            yield Reject("bad_json", where)
        else:
            yield Row(fields, where) if isinstance(fields, dict) else Reject("not_an_object", where)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    """Lines without their ends; None for one that is longer than any row may be, and is passed over."""
    tail: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        size += len(first)
        if size <= MAX_LINE_BYTES:
            tail.append(first)
        else:
            tail.clear()
        if others:
            yield b"".join(tail) if size <= MAX_LINE_BYTES else None
            yield from others[:-1]
            tail, size = [others[-1]], len(others[-1])
    if size:
        yield b"".join(tail) if size <= MAX_LINE_BYTES else None


def _read_all(file: Any) -> Iterator[bytes]:
    # read1 hands over what it has: read would throw it away when the stream breaks off.
    while chunk := file.read1(CHUNK_BYTES):
        yield chunk


def _gzip_chunks(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(file, "rb") as unpacked:
        yield from _read_all(unpacked)


def _zstd_chunks(file: IO[bytes]) -> Iterator[bytes]:
    """Every frame of a .zst file. Raises EOFError if the last one breaks off, which zstandard's own reader passes over."""
    import zstandard

    # Large corpora are often packed with `--long=31`.
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    try:
        frame = None
        while packed := file.read(ZSTD_CHUNK_BYTES):
            while packed:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("the file breaks off inside a frame")
    except zstandard.ZstdError as error:
        raise EOFError(str(error)) from error


# Files of lines, plain and packed.
_CHUNKS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    ".jsonl": _read_all,
    ".jsonl.gz": _gzip_chunks,
    ".jsonl.zst": _zstd_chunks,
}
FORMATS: dict[str, FileFormat] = {
    **{extension: FileFormat(_line_rows, 1.0 if extension == ".jsonl" else 3.0) for extension in _CHUNKS},
    ".parquet": FileFormat(_parquet_rows, 1.8),
    # Of packed files of lines.
    ".tar": FileFormat(_tar_rows, 3.0),
}
EXTENSIONS = tuple(FORMATS)
