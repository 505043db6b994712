"""A Ray Data sink that writes Parquet files which are seen whole or not at all, with page checksums and counts in the footer."""

import json
import posixpath
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from sarm.data.activations import file_moments, write_activation_file

_COUNTS = b"sarm_counts"


class ParquetSink(BlockBasedFileDatasink):
    """Writes the rows whose `reject` column is null, and counts the others by reason.

    File names depend on the write task alone, so that a task that Ray runs again replaces what its first attempt wrote.
    """

    def __init__(self, folder: Path, table_schema: pa.Schema, rows_per_file: int):
        super().__init__(str(folder), file_format="parquet", min_rows_per_file=rows_per_file)
        self._schema = table_schema

    def write_block(self, block: BlockAccessor, block_index: int, ctx: Any) -> None:
        table = block.to_arrow()
        reject = table.column("reject")
        counts: dict[str, Any] = {
            "rejected": dict(Counter(reason for reason in reject.to_pylist() if reason is not None)),
            "truncated": int(pc.sum(table.column("truncated")).as_py() or 0),
        }
        kept = table.filter(pc.is_null(reject)).select(self._schema.names).cast(self._schema)
        if "activation" in self._schema.names and kept.num_rows:
            counts["moments"] = file_moments(kept, json.loads(self._schema.metadata[b"sarm"])["dtype"])
        kept = kept.replace_schema_metadata({**(self._schema.metadata or {}), _COUNTS: json.dumps(counts).encode()})
        name = f"part-{ctx.task_idx:06}.parquet"
        temporary = posixpath.join(self.path, f".{name}.{uuid.uuid4().hex}.tmp")
        with self.open_output_stream(temporary) as file:
            write_activation_file(kept, file)
        self.filesystem.move(temporary, posixpath.join(self.path, name))


def read_counts(folder: Path) -> dict[str, Any]:
    """The counts of all files of a folder: rows, rejected by reason, truncated, and the moments of each file."""
    rows, truncated, rejected, moments = 0, 0, Counter[str](), []
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            counts = json.loads(file.schema_arrow.metadata[_COUNTS])
            rows += file.metadata.num_rows
        truncated += counts["truncated"]
        rejected.update(counts["rejected"])
        if "moments" in counts:
            moments.append(counts["moments"])
    return {"rows": rows, "truncated": truncated, "rejected": dict(rejected), "moments": moments}


def remove_temporaries(folder: Path) -> None:
    """Delete what killed write tasks left."""
    for path in folder.glob(".*.tmp"):
        path.unlink()
