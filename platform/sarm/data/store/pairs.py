"""The pairs of a pairs/v1 folder: whole, and as passes read them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from sarm.contracts.ids import stable_int

PAIR_COLUMNS = ("pair_id", "prompt_id", "split", "prompt", "chosen", "rejected", "margin", "subset")
"""What tokenising a pair takes, and what goes with its scores."""


def load_pairs(folder: Path, split: str = "all") -> pa.Table:
    """The pairs of one split, or of all, in the order of their files."""
    return of_split(ds.dataset([str(path) for path in sorted(folder.glob("*.parquet"))]).to_table(), split)


def of_split(pairs: pa.Table, split: str) -> pa.Table:
    """Those of one split, or all."""
    return pairs if split == "all" else pairs.filter(pc.equal(pairs["split"], split))


def pair_numbers(pairs: pa.Table) -> list[int]:
    """The pairs' ids as numbers, for tables whose rows are known by one."""
    return [stable_int(pair_id) for pair_id in pairs["pair_id"].to_pylist()]
