"""Rows of files with columns: Parquet, and Arrow as `save_to_disk` writes it."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.data.sources.extension_types import foreign_types_of_arrow, foreign_types_of_parquet
from sarm.data.sources.rows import Reject, Row
from sarm.settings.checks import UserError

BATCH_ROWS = 512
# A file of Arrow's, not a stream, has this before the stream.
_FILE_MAGIC = b"ARROW1\0\0"


def schema_of(path: Path) -> pa.Schema:
    """The columns of a Parquet or Arrow file.

    Raises UserError if the file is empty, truncated or neither, or has a column of a type that may hold code.
    """
    is_arrow = _is_arrow(path)
    try:
        _refuse_foreign_types(path)
        if not is_arrow:
            return pq.read_schema(path)
        with _stream(path) as file:
            return pa.ipc.open_stream(file).schema
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow" if is_arrow else "Parquet"
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as {kind}: empty, truncated or something else. Copy it again."
        ) from error


def _is_arrow(path: Path) -> bool:
    return path.name.lower().endswith(".arrow")


def _refuse_foreign_types(path: Path) -> None:
    if foreign := (foreign_types_of_arrow if _is_arrow(path) else foreign_types_of_parquet)(path):
        raise UserError(
            f"{path} has a column of an extension type ({', '.join(sorted(foreign))[:80]}), which may hold code. Write it again with plain columns."
        )


def parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row | Reject]:
    """The rows of a Parquet file, of all columns or of those that are wanted. Raises UserError for a column of a type that may hold code."""
    _refuse_foreign_types(path)
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        wanted = list(columns) if columns is not None else None
        yield from _batch_rows(path, file.iter_batches(batch_size=BATCH_ROWS, columns=wanted))


def arrow_rows(path: Path, columns: Sequence[str] | None) -> Iterator[Row | Reject]:
    """The same of an Arrow stream or file."""
    _refuse_foreign_types(path)
    with _stream(path) as file, pa.ipc.open_stream(file) as stream:
        wanted = [name for name in stream.schema.names if columns is None or name in columns]
        parts = (
            batch.select(wanted).slice(start, BATCH_ROWS)
            for batch in stream
            for start in range(0, batch.num_rows, BATCH_ROWS)
        )
        yield from _batch_rows(path, parts)


def _stream(path: Path) -> IO[bytes]:
    file = path.open("rb")
    file.seek(len(_FILE_MAGIC) if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC else 0)
    return file


def _batch_rows(path: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[Row | Reject]:
    number = 0
    for batch in batches:
        decode = _decoder(batch.schema)
        try:
            rows: list[dict[str, Any] | None] = list(batch.to_pylist())
        except UnicodeDecodeError:
            rows = [_readable(batch.slice(i, 1)) for i in range(batch.num_rows)]
        for fields in rows:
            where = f"{path} row {number}"
            number += 1
            yield Reject("invalid_utf8", where) if fields is None else Row(decode(fields), where)


def _readable(one_row: pa.RecordBatch) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = one_row.to_pylist()[0]
        return row
    except UnicodeDecodeError:
        return None


def _decoder(schema: pa.Schema) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Columns of `arrow.json`, which `datasets` writes for mixed types, as the values that they spell."""
    names = [field.name for field in schema if isinstance(field.type, pa.JsonType)]

    def decode(fields: dict[str, Any]) -> dict[str, Any]:
        return fields | {name: _json(fields[name]) for name in names}

    return decode if names else lambda fields: fields


def _json(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
