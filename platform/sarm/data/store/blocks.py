"""Blocks: consecutive rows of Parquet files, cut by size. What is done is written and repeated block by block.

The cut depends on the files and the settings alone, so that an interrupted run that is started again finds its blocks.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

# A small corpus is cut this fine, so that several actors have work; a block smaller than the second is not worth a file.
_MIN_BLOCKS = 64
_MIN_BYTES = 1 << 15
# Columns that no file has, for `read_block` to make: which file a row is of, and its number there.
FILE, ROW = "__file", "__row"


class Block(NamedTuple):
    """Rows `start` to `stop` of one file."""

    number: int
    file: str
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"block {self.number} (rows {self.start} to {self.stop - 1} of {self.file})"


def plan_blocks(
    files: Sequence[Path], kilobytes: int, *, together: str | None = None, limit_rows: int | None = None
) -> list[Block]:
    """The files' first `limit_rows` rows as blocks of about `kilobytes` of decoded columns.

    Rows that are neighbours and equal in column `together` stay in one block.
    """
    groups = [(path, pq.read_metadata(path)) for path in files]
    total = sum(about.row_group(i).total_byte_size for _, about in groups for i in range(about.num_row_groups))
    block_bytes = min(kilobytes * 1024, max(_MIN_BYTES, total // _MIN_BLOCKS))
    blocks: list[Block] = []
    left = sum(about.num_rows for _, about in groups) if limit_rows is None else limit_rows
    for path, about in groups:
        stops = _stops(about, block_bytes)
        if together is not None:
            stops = _moved(stops, pq.read_table(path, columns=[together]).column(0).to_pylist())
        start = 0
        for stop in stops:
            if left == 0:
                return blocks
            stop = min(stop, start + left)
            blocks.append(Block(len(blocks), str(path), start, stop))
            left -= stop - start
            start = stop
    return blocks


def table_blocks(table: pa.Table, path: Path, rows: int) -> list[Block]:
    """A table of this process as blocks of `rows` rows of a file, which is written for the workers, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, row_group_size=rows, write_page_checksum=True)
    temporary.replace(path)
    return blocks_of(path, rows)


def blocks_of(path: Path, rows: int) -> list[Block]:
    """The rows of a file that `table_blocks` wrote, as it cut them."""
    num_rows = pq.read_metadata(path).num_rows
    return [Block(i, str(path), start, min(start + rows, num_rows)) for i, start in enumerate(range(0, num_rows, rows))]


def read_block(block: Block, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a block, page checksums verified; FILE and ROW among the columns say where each stands.

    Raises OSError that names the file if it is damaged.
    """
    try:
        with pq.ParquetFile(block.file, page_checksum_verification=True) as file:
            wanted, first, start = [], 0, None
            for i in range(file.num_row_groups):
                rows = file.metadata.row_group(i).num_rows
                if first < block.stop and first + rows > block.start:
                    wanted.append(i)
                    start = first if start is None else start
                first += rows
            names = None if columns is None else [name for name in columns if name not in (FILE, ROW)]
            table = file.read_row_groups(wanted, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise OSError(f"{block.file} is damaged: {error}") from error
    table = table.slice(block.start - (start or 0), block.num_rows)
    places = {FILE: [block.file] * block.num_rows, ROW: range(block.start, block.stop)}
    for name in places.keys() & set(columns or ()):
        table = table.append_column(name, pa.array(places[name]))
    return table


def _stops(about: pq.FileMetaData, block_bytes: int) -> Iterator[int]:
    """Where blocks of a file end: several small row groups make one, a large one is cut into equal parts."""
    end = waiting = 0
    for i in range(about.num_row_groups):
        group = about.row_group(i)
        start, end = end, end + group.num_rows
        waiting += group.total_byte_size
        if waiting > block_bytes:
            parts = min(group.num_rows, -(-group.total_byte_size // block_bytes))
            yield from (start + group.num_rows * part // parts for part in range(1, parts + 1))
            waiting = 0
    if waiting:
        yield end


def _moved(stops: Iterator[int], values: Sequence[object]) -> Iterator[int]:
    last = 0
    for stop in stops:
        while 0 < stop < len(values) and values[stop] == values[stop - 1]:
            stop += 1
        if stop > last:
            yield stop
            last = stop
