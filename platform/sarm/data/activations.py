"""activations/v1: raw 16-bit residual vectors in Parquet, one fixed-size binary a row, and their reader.

N rows, D d_in. A vector is read back by reinterpreting bytes: `vectors(table)` is the whole decoder.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from sarm.config import UserError
from sarm.manifest import read_manifest
from sarm.schema import hash_share

ACTIVATIONS = "activations/v1"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def activation_table(
    columns: dict[str, Any], vectors_ND: Float[Tensor, "rows d_in"], dtype: str, table_schema: pa.Schema
) -> pa.Table:
    """Key columns and vectors as an activations/v1 table."""
    bits = vectors_ND.to(_DTYPES[dtype]).contiguous().view(torch.int16).numpy()
    width = 2 * vectors_ND.shape[1]
    raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(bits), [None, pa.py_buffer(bits.tobytes())])
    arrays = [
        raw if field.name == "activation" else pa.array(columns[field.name], field.type) for field in table_schema
    ]
    return pa.Table.from_arrays(arrays, schema=table_schema)


def vectors(table: pa.Table, dtype: str) -> Float[Tensor, "rows d_in"]:
    """The vectors of a table, as stored."""
    column = table.column("activation").combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    width = column.type.byte_width // 2
    flat = np.frombuffer(
        column.buffers()[1], dtype=np.int16, count=len(column) * width, offset=column.offset * width * 2
    )
    return torch.from_numpy(flat.reshape(len(column), width).copy()).view(_DTYPES[dtype])


def write_activation_file(table: pa.Table, file: Any) -> None:
    """Uncompressed, without dictionaries, with page checksums: random bits do not compress, and a flipped one must be noticed."""
    pq.write_table(
        table,
        file,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        row_group_size=8192,
        store_schema=True,
    )


class ActivationStore:
    """A finished activations/v1 folder.

    Raises UserError if it is unfinished, empty or damaged, or its files are not of one width and layer.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder, ACTIVATIONS)
        self.files = [folder / name for name in sorted(self.manifest.files) if name.endswith(".parquet")]
        if not self.files or not self.manifest.counts.get("rows"):
            raise UserError(f"{folder} holds no activations. Extract them from a corpus with sentences in it.")
        self.metadata: dict[str, Any] = self.manifest.counts["activations"]
        self.d_in: int = self.metadata["d_in"]
        self.num_rows: int = self.manifest.counts["rows"]
        for path in self.files:
            try:
                found = json.loads((pq.read_schema(path).metadata or {}).get(b"sarm", b"{}"))
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(path, error) from error
            if found != self.metadata:
                raise UserError(
                    f"{path} holds activations of {found}, expected {self.metadata}. Delete {folder} and extract again."
                )

    def read(
        self, columns: Sequence[str] = ("row_id", "doc_id", "side", "position")
    ) -> tuple[pa.Table, Float[Tensor, "rows d_in"]]:
        """All rows in memory, in file order: key columns and vectors in float32."""
        tables, parts = [], []
        for table in self.tables([*columns, "activation"]):
            tables.append(table.select(list(columns)))
            parts.append(vectors(table, self.metadata["dtype"]).float())
        return pa.concat_tables(tables), torch.cat(parts)

    def read_sides(self) -> tuple[dict[tuple[int, str], int], Float[Tensor, "rows d_in"]]:
        """Rows of pairs by (`schema.stable_int` of the pair's id, side), and all vectors in float32."""
        table, x_ND = self.read(["row_id", "side"])
        keys = zip(table["row_id"].to_pylist(), table["side"].to_pylist(), strict=True)
        return {key: row for row, key in enumerate(keys)}, x_ND

    def tables(self, columns: Sequence[str], files: Sequence[Path] | None = None) -> Iterator[pa.Table]:
        """Row group after row group of the given files (all of them by default), checksums verified."""
        for path in self.files if files is None else files:
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for group in range(file.num_row_groups):
                        yield file.read_row_group(group, columns=list(columns))
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> UserError:
        return UserError(f"{path} is damaged: {error}. Delete {self.folder} and extract again.")


class ShuffledRows:
    """Rows of a store in windows of about `window_rows`: files in random order, each window held in memory to be shuffled.

    Rows whose document hashes below `heldout_share` are left out; they are in `heldout` (at most `max_heldout` of them). A
    store of one window is read once and stays in memory.
    """

    def __init__(
        self, store: ActivationStore, heldout_share: float, window_rows: int = 1_000_000, max_heldout: int = 16_384
    ):
        self._store, self._share, self._window_rows = store, heldout_share, window_rows
        self._cached: Tensor | None = None
        kept, heldout, num_heldout = [], [], 0
        for table in store.tables(["doc_id", "activation"]):
            is_heldout = self._heldout_mask(table)
            rows = vectors(table, store.metadata["dtype"])
            num_heldout += int(is_heldout.sum())
            heldout.append(rows[is_heldout])
            if store.num_rows <= window_rows:
                kept.append(rows[~is_heldout])
        self.num_rows = store.num_rows - num_heldout
        if self.num_rows == 0:
            raise UserError(
                f"all activations of {store.folder} are held out: they come from too few documents. Add sources."
            )
        self.heldout = torch.cat(heldout)[:max_heldout].float()
        if store.num_rows <= window_rows:
            self._cached = torch.cat(kept).float()

    def windows(self, seed: int, epoch: int) -> Iterator[Tensor]:
        """Residual vectors in float32, the same windows for the same (seed, epoch)."""
        if self._cached is not None:
            yield self._cached
            return
        order = np.random.default_rng([seed, epoch]).permutation(len(self._store.files))
        waiting: list[Tensor] = []
        for table in self._store.tables(["doc_id", "activation"], [self._store.files[i] for i in order]):
            waiting.append(vectors(table, self._store.metadata["dtype"])[~self._heldout_mask(table)])
            if sum(map(len, waiting)) >= self._window_rows:
                yield torch.cat(waiting).float()
                waiting = []
        # All that is left may be held out, and a step without rows has no loss.
        if any(map(len, waiting)):
            yield torch.cat(waiting).float()

    def _heldout_mask(self, table: pa.Table) -> Tensor:
        # With a salt: training prompts are those that the unsalted hash left over.
        return torch.tensor(
            [hash_share(f"sae:{doc}") < self._share for doc in table.column("doc_id").to_pylist()], dtype=torch.bool
        )


def file_moments(table: pa.Table, dtype: str) -> dict[str, Any]:
    """Row count, sums and sums of squares per dimension, and sum of norms, of one file's vectors."""
    x = vectors(table, dtype).double()
    return {
        "rows": len(x),
        "sum": x.sum(0).tolist(),
        "squares": x.square().sum(0).tolist(),
        "norms": float(x.norm(dim=1).sum()),
    }


def statistics_of(moments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation per dimension and mean norm over files, from their moments."""
    rows = sum(m["rows"] for m in moments)
    mean = np.sum([m["sum"] for m in moments], axis=0) / rows
    variance = np.maximum(np.sum([m["squares"] for m in moments], axis=0) / rows - mean**2, 0.0)
    return {
        "rows": rows,
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "mean_norm": sum(m["norms"] for m in moments) / rows,
    }
