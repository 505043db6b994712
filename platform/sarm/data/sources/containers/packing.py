"""Packed files as streams of bytes, by the end of their names; a damaged one raises what `damage.DAMAGE` lists, after what came before."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow as pa

from sarm.data.sources.rows import CHUNK_BYTES, MAX_LINE_BYTES

# A whole chunk is unpacked at once, up to 30,000 times its size, so this bounds the memory that a hostile file can take.
ZSTD_CHUNK_BYTES = 1 << 10


def packing_of(name: str) -> str:
    """The extension of the packing, empty for a plain file."""
    return next((extension for extension in PACKINGS if extension and name.lower().endswith(extension)), "")


def chunks_of(name: str, file: IO[bytes]) -> Iterator[bytes]:
    """The unpacked bytes of a file of this name."""
    return PACKINGS[packing_of(name)](file)


def lines_of(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
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


class ChunkFile(io.RawIOBase):
    """Chunks as a file that can be read once, from its beginning."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As files do it."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


def _read_all(file: Any) -> Iterator[bytes]:
    # read1 hands over what it has: read would throw it away when the stream breaks off.
    while chunk := file.read1(CHUNK_BYTES):
        yield chunk


def _gzip_chunks(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(file, "rb") as unpacked:
        yield from _read_all(unpacked)


def _bz2_chunks(file: IO[bytes]) -> Iterator[bytes]:
    with bz2.open(file, "rb") as unpacked:
        yield from _read_all(unpacked)


def _xz_chunks(file: IO[bytes]) -> Iterator[bytes]:
    with lzma.open(file, "rb") as unpacked:
        yield from _read_all(unpacked)


def _lz4_chunks(file: IO[bytes]) -> Iterator[bytes]:
    with pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "lz4") as unpacked:
        while chunk := unpacked.read(CHUNK_BYTES):
            yield chunk


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


PACKINGS: dict[str, Callable[[IO[bytes]], Iterator[bytes]]] = {
    "": _read_all,
    ".gz": _gzip_chunks,
    ".bz2": _bz2_chunks,
    ".xz": _xz_chunks,
    ".zst": _zstd_chunks,
    ".lz4": _lz4_chunks,
}
