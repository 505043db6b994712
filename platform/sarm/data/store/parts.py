"""Part files: the output of one block in one folder, seen whole or not at all.

A block is done when its part file is there: it is written beside its place, flushed and renamed. Its footer counts what became of the
block's rows and names those that gave nothing, so that a folder can be audited without anything beside it.
"""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sarm.contracts.tables import REJECTED_TABLE
from sarm.data.store.activations import file_moments, write_activation_file
from sarm.data.store.blocks import Block, read_block
from sarm.settings.checks import UserError

REJECTED = "rejected.parquet"
_COUNTS = b"sarm_counts"
# What says which input row gave nothing.
_REJECT_COLUMNS = ("row_id", "pair_id", "side", "position", "row_ids", "pair_ids", "completion_id", "ref")


def with_sink_columns(table_schema: pa.Schema) -> pa.Schema:
    """A schema with the two columns that are counted instead of stored: `reject` (a reason, or null) and `truncated`."""
    return table_schema.append(pa.field("reject", pa.string())).append(pa.field("truncated", pa.bool_()))


def finished_table(table: pa.Table, table_schema: pa.Schema, **counts: Any) -> pa.Table:
    """The rows without a `reject` reason, in `table_schema`; reasons, rejected rows and moments in its metadata."""
    reject = table.column("reject")
    is_kept = pc.is_null(reject)
    left_out = table.filter(pc.invert(is_kept))
    columns = [name for name in _REJECT_COLUMNS if name in table.column_names]
    counts |= {
        "rejected": dict(Counter(left_out.column("reject").to_pylist())),
        "truncated": int(pc.sum(table.column("truncated")).as_py() or 0),
        "rejects": left_out.select([*columns, "reject"]).to_pylist(),
    }
    kept = table.filter(is_kept).select(table_schema.names).cast(table_schema)
    if "activation" in table_schema.names and kept.num_rows:
        counts["moments"] = file_moments(kept, json.loads(table_schema.metadata[b"sarm"])["dtype"])
    if {"activation", "kind"} <= set(table_schema.names):
        counts["kinds"] = dict(Counter(kept.column("kind").to_pylist()))
    return kept.replace_schema_metadata({**(table_schema.metadata or {}), _COUNTS: json.dumps(counts).encode()})


def part_name(number: int) -> str:
    """File name of a block's output."""
    return f"part-{number:06}.parquet"


def write_part(table: pa.Table, folder: Path, number: int) -> None:
    """Write a `finished_table` as the part of a block. Writing it again replaces it."""
    name = part_name(number)
    temporary = folder / f".{name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            write_activation_file(table, file)
            file.flush()
        temporary.replace(folder / name)
    finally:
        # A full disk leaves nothing behind; a killed process does, for `remove_temporaries`.
        temporary.unlink(missing_ok=True)


def has_part(folder: Path, number: int) -> bool:
    """Whether a block's output is there, whole: a file that cannot be opened is deleted, and its block is not done."""
    path = folder / part_name(number)
    if not path.exists():
        return False
    try:
        return _COUNTS in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        path.unlink()
        return False


def read_counts(folder: Path) -> dict[str, Any]:
    """The counts of all parts of a folder: rows, rejected by reason, truncated, tokens, the moments of each file, and rows by kind if they have any."""
    totals: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    moments = []
    for path in part_files(folder):
        counts, num_rows = _footer(path)
        totals.update({"rows": num_rows, "truncated": counts["truncated"], **counts.get("cost", {})})
        rejected.update(counts["rejected"])
        kinds.update(counts.get("kinds", {}))
        if "moments" in counts:
            moments.append(counts["moments"])
    of_kinds = {"kinds": dict(sorted(kinds.items()))} if kinds else {}
    return {"rows": 0, "truncated": 0, **totals, "rejected": dict(rejected), **of_kinds, "moments": moments}


def part_files(folder: Path) -> list[Path]:
    """The part files of a folder, in the order of their blocks."""
    return sorted(folder.glob("part-*.parquet"))


def read_parts(folder: Path) -> pa.Table:
    """The rows of all part files, in the order of their blocks. Raises UserError if there are none."""
    files = [str(path) for path in part_files(folder)]
    if not files:
        raise UserError(f"{folder} holds no part files. Delete it and run its stage again.")
    return ds.dataset(files).to_table().replace_schema_metadata(None)


def remove_temporaries(folder: Path) -> None:
    """Delete what killed writers left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def read_rejects(folder: Path) -> list[dict[str, Any]]:
    """The rows of all parts that gave nothing: what tells them apart, and the reason as `reject`."""
    return [reject for path in part_files(folder) for reject in _footer(path)[0]["rejects"]]


def write_rejected(folder: Path) -> int:
    """Collect the rejected rows of all parts in `rejected.parquet`, if there are any; returns their number."""
    rows = [
        {"row_id": reject.get("row_id"), "pair_id": reject.get("pair_id"), "side": reject.get("side"),
         "position": reject.get("position"), "reason": reject["reject"]}
        for reject in read_rejects(folder)
    ]  # fmt: skip
    if rows:
        pq.write_table(pa.Table.from_pylist(rows, schema=REJECTED_TABLE), folder / REJECTED, write_page_checksum=True)
    return len(rows)


def audit(
    folder: Path,
    blocks: Iterable[Block],
    input_columns: Sequence[str],
    input_ids: Callable[[pa.Table], Sequence[Any]],
    id_column: str,
    key_columns: Sequence[str],
) -> dict[str, int]:
    """Read the ids of every block from input and output again, and compare: inputs = outputs + rejected, none twice.

    An id column of lists names the input rows that each output row stands for; then `key_columns` alone tell output rows apart.

    Returns how many input rows and blocks were compared. Raises AuditError, with the block, at the first difference.
    """
    num_rows = num_blocks = 0
    seen: list[np.ndarray] = []
    for block in blocks:
        wanted = set(input_ids(read_block(block, input_columns)))
        path = folder / part_name(block.number)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read(columns=[id_column, *key_columns])
            rejects = json.loads(file.schema_arrow.metadata[_COUNTS])["rejects"]
        ids = table.column(id_column)
        is_list = pa.types.is_list(ids.type)
        found = set(pc.unique(pc.list_flatten(ids) if is_list else ids).to_pylist())
        found_or_rejected = found.union(*(reject[id_column] if is_list else [reject[id_column]] for reject in rejects))
        if missing := wanted - found_or_rejected:
            raise AuditError(
                f"{path}: {len(missing)} rows of {block} are neither there nor rejected, e.g. {min(missing)}"
            )
        if strange := found_or_rejected - wanted:
            raise AuditError(f"{path}: {len(strange)} rows are not of {block}, e.g. {min(strange)}")
        distinct = table.group_by([*key_columns] if is_list else [id_column, *key_columns]).aggregate([]).num_rows
        if distinct != table.num_rows:
            raise AuditError(f"{path}: {table.num_rows - distinct} rows of {block} are there twice")
        num_rows, num_blocks = num_rows + len(wanted), num_blocks + 1
        seen.append(np.array([hash(i) for i in wanted], dtype=np.int64))
    ids = np.concatenate(seen) if seen else np.zeros(0, np.int64)
    if len(np.unique(ids)) != len(ids):
        raise AuditError(f"{folder}: {len(ids) - len(np.unique(ids))} ids are in more than one block of its input")
    return {"audited_rows": num_rows, "audited_blocks": num_blocks}


class AuditError(RuntimeError):
    """A folder does not hold what its input asks for."""


def _footer(path: Path) -> tuple[dict[str, Any], int]:
    with pq.ParquetFile(path) as file:
        return json.loads(file.schema_arrow.metadata[_COUNTS]), file.metadata.num_rows
