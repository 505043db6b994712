"""Blocks of what contexts are collected from: whole slices of pairs and texts, since a slice shares forward passes."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.data.store.blocks import Block
from sarm.passes.contexts import pair_slices, text_slices

_MAX_BLOCKS = 4096


def pair_blocks(files: Sequence[Path], split: str) -> tuple[list[Block], int]:
    """Blocks of whole slices over the pairs of a split, and how many pairs they hold; rows of other splits may stand between them."""
    slices: list[tuple[Path, int, int, int]] = []
    num_rows = 0
    for path, group, first, table in _row_groups(files, ["prompt_id", "split"]):
        prompts, splits = (table[name].to_pylist() for name in ("prompt_id", "split"))
        rows = [row for row in range(table.num_rows) if split in ("all", splits[row])]
        num_rows += len(rows)
        for start, stop in pair_slices([prompts[row] for row in rows]):
            slices.append((path, group, first + rows[start], first + rows[stop - 1] + 1))
    return _blocks(slices), num_rows


def text_blocks(files: Sequence[Path], max_texts: int | None) -> tuple[list[Block], int]:
    """Blocks of whole slices over the texts of a corpus, and how many texts they hold."""
    slices: list[tuple[Path, int, int, int]] = []
    num_rows = 0
    for path, group, first, table in _row_groups(files, ["row_id"]):
        here = table.num_rows if max_texts is None else min(max_texts - num_rows, table.num_rows)
        num_rows += here
        slices += [(path, group, first + start, first + stop) for start, stop in text_slices(here)]
    return _blocks(slices), num_rows


def _blocks(slices: Sequence[tuple[Path, int, int, int]]) -> list[Block]:
    """Slices (file, row group, start, stop) as blocks of a row group's neighbours: few enough for their part files to be handled."""
    size = -(-len(slices) // _MAX_BLOCKS)
    blocks: list[Block] = []
    for (path, _), own in itertools.groupby(slices, lambda piece: piece[:2]):
        members = list(own)
        for i in range(0, len(members), size):
            last = members[min(i + size, len(members)) - 1]
            blocks.append(Block(len(blocks), str(path), members[i][2], last[3]))
    return blocks


def _row_groups(files: Sequence[Path], columns: list[str]) -> Iterator[tuple[Path, int, int, pa.Table]]:
    for path in files:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            first = 0
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                yield path, group, first, table
                first += table.num_rows
