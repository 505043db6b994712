"""activations/v1: raw 16-bit residual vectors in Parquet, one fixed-size binary a row, and their reader.

N rows, D d_in. A vector is read back by reinterpreting bytes: `vectors(table)` is the whole decoder.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sarm.contracts.folders import ACTIVATIONS_FOLDER
from sarm.contracts.manifest import read_manifest
from sarm.contracts.tables import KINDS
from sarm.contracts.untrusted import read_json
from sarm.settings.checks import UserError

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def activation_table(
    columns: dict[str, Any], vectors_ND: Float[Tensor, "rows d_in"], dtype: str, table_schema: pa.Schema
) -> pa.Table:
    """Key columns and vectors as an activations/v1 table."""
    bits = vectors_ND.to(_DTYPES[dtype]).contiguous().view(torch.int16).numpy()
    width = 2 * vectors_ND.shape[1]
    raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(bits), [None, pa.py_buffer(bits.tobytes())])
    arrays = [
        raw if field.name == "activation" else _as_array(columns[field.name], field.type) for field in table_schema
    ]
    return pa.Table.from_arrays(arrays, schema=table_schema)


def _as_array(values: Any, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)


def vectors(table: pa.Table, dtype: str) -> Float[Tensor, "rows d_in"]:
    """The vectors of a table, as stored."""
    column = table.column("activation").combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    width = column.type.byte_width // 2
    flat = np.frombuffer(
        column.buffers()[1], dtype=np.int16, count=len(column) * width, offset=column.offset * width * 2
    )
    return torch.from_numpy(flat.reshape(len(column), width).copy()).view(_DTYPES[dtype])


def kinds_of(table: pa.Table) -> UInt8[Tensor, " rows"]:
    """Numbers in `KINDS`; 0 where a table does not say."""
    if "kind" not in table.column_names:
        return torch.zeros(len(table), dtype=torch.uint8)
    numbers = pc.index_in(table.column("kind"), value_set=pa.array(KINDS))
    return torch.from_numpy(numbers.combine_chunks().to_numpy(zero_copy_only=False).astype(np.uint8))


def unusable_rows(vectors_ND: Float[Tensor, "rows d_in"]) -> dict[str, Bool[Tensor, " rows"]]:
    """Which rows cannot be standardised, by reason: `not finite` (NaN or infinite) and `constant` (no variance; zero rows too)."""
    x = vectors_ND.float()
    lowest, highest = x.amin(1), x.amax(1)
    is_finite = lowest.isfinite() & highest.isfinite()
    return {"not finite": ~is_finite, "constant": is_finite & (lowest == highest)}


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
    """A finished activations/v1 folder; `has_kinds` if it says what each row is the end of.

    Raises UserError if it is unfinished, empty or damaged, or its files are not of one width and layer.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder, ACTIVATIONS_FOLDER)
        self.files = [folder / name for name in sorted(self.manifest.files) if re.fullmatch(r"part-\d+\.parquet", name)]
        if not self.files or not self.manifest.counts.get("rows"):
            raise UserError(f"{folder} holds no activations. Extract them from a corpus with sentences in it.")
        self.metadata: dict[str, Any] = self.manifest.counts["activations"]
        self.d_in: int = self.metadata["d_in"]
        self.torch_dtype = _DTYPES[self.metadata["dtype"]]
        self.num_rows: int = self.manifest.counts["rows"]
        self.has_kinds = False
        for path in self.files:
            try:
                parquet_schema = pq.read_schema(path)
                found = json.loads((parquet_schema.metadata or {}).get(b"sarm", b"{}"))
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(path, error) from error
            if found != self.metadata:
                raise UserError(
                    f"{path} holds activations of {found}, expected {self.metadata}. Delete {folder} and extract again."
                )
            self.has_kinds = "kind" in parquet_schema.names
            stored = parquet_schema.field("activation").type
            if stored != pa.binary(2 * self.d_in):
                raise UserError(
                    f"{path} holds {stored} values, expected {2 * self.d_in} bytes for d_in {self.d_in}. Delete {folder} and extract again."
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

    def usable_kinds(
        self, share: slice = slice(None)
    ) -> Iterator[tuple[Int[Tensor, " rows"], Float[Tensor, "rows d_in"]]]:
        """Kinds, by number in `KINDS`, and vectors that can be standardised, in float32, row group after row group.

        Row groups outside of `share` are not read.
        """
        columns = ["activation", *(["kind"] if self.has_kinds else [])]
        for file, number in self.group_places()[share]:
            table = self.row_group(file, number, columns)
            rows = vectors(table, self.metadata["dtype"])
            is_bad = torch.stack(list(unusable_rows(rows).values())).any(0)
            yield kinds_of(table)[~is_bad].long(), rows[~is_bad].float()

    def usable_vectors(self, share: slice = slice(None)) -> Iterator[Float[Tensor, "rows d_in"]]:
        """The vectors that can be standardised, in float32, row group after row group; those of the row groups in `share`."""
        return (rows_ND for _, rows_ND in self.usable_kinds(share))

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Row group after row group in file order, checksums verified."""
        return (table for _, _, table in self.row_groups(columns))

    def row_groups(self, columns: Sequence[str]) -> Iterator[tuple[Path, int, pa.Table]]:
        """File, number in the file and rows of each row group in file order, checksums verified."""
        for path in self.files:
            try:
                with pq.ParquetFile(path, page_checksum_verification=True) as file:
                    for number in range(file.num_row_groups):
                        yield path, number, file.read_row_group(number, columns=list(columns))
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(path, error) from error

    def group_places(self) -> list[tuple[Path, int]]:
        """File, and number in the file, of each row group in file order; no row is read."""
        places: list[tuple[Path, int]] = []
        for path in self.files:
            try:
                places += [(path, number) for number in range(pq.read_metadata(path).num_row_groups)]
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(path, error) from error
        return places

    def row_group(self, path: Path, number: int, columns: Sequence[str]) -> pa.Table:
        """One row group of a file, checksums verified."""
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                return file.read_row_group(number, columns=list(columns))
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(path, error) from error

    def spread(self) -> list[float]:
        """Standard deviation of each dimension, as written with the data; ones where a store has no statistics."""
        if "statistics.json" not in self.manifest.files:
            return [1.0] * self.d_in
        path = self.folder / "statistics.json"
        try:
            return [float(value) for value in read_json(path)["std"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> UserError:
        return UserError(f"{path} is damaged: {error}. Delete {self.folder} and extract again.")


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
