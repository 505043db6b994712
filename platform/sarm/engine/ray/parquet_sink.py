"""A Ray Data sink that writes Parquet files which are seen whole or not at all, with page checksums."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from sarm.data.store.parts import finished_table, write_part


class ParquetSink(BlockBasedFileDatasink):
    """Writes the rows whose `reject` column is null, and counts the others by reason.

    File names depend on the write task alone, so that a task that Ray runs again replaces what its first attempt wrote.
    """

    def __init__(self, folder: Path, table_schema: pa.Schema, rows_per_file: int):
        super().__init__(str(folder), file_format="parquet", min_rows_per_file=rows_per_file)
        self._schema = table_schema

    def write_block(self, block: BlockAccessor, block_index: int, ctx: Any) -> None:
        write_part(finished_table(block.to_arrow(), self._schema), Path(self.path), ctx.task_idx)
