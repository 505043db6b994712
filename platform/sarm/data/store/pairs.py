"""The pairs of a pairs/v1 folder."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds


def load_pairs(folder: Path, split: str = "all") -> pa.Table:
    """The pairs of one split, or of all, in the order of their files."""
    table = ds.dataset([str(path) for path in sorted(folder.glob("*.parquet"))]).to_table()
    return table if split == "all" else table.filter(pc.equal(table.column("split"), split))
