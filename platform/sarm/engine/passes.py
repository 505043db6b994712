"""Passes over Parquet files: which blocks of rows, what is computed of them, where it goes, and whether all of it is there.

Who runs one, actors of a cluster (`engine.ray.passes`) or this process (`engine.in_process`), makes no difference to what comes out.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sarm.data.store.blocks import Block
from sarm.data.store.parts import audit, has_part, read_counts, write_rejected
from sarm.engine.ray.block_actor import Inputs, Output
from sarm.settings.checks import UserError

_KEYS = ("side", "position")


@dataclass(frozen=True)
class Pass:
    """Blocks, what is computed of them, and where it goes.

    `input_ids` gives the ids of a table of `id_columns` as the column `output_id` of the outputs has them: the
    first of these columns, if it is None. Where that is a column of lists, output rows stand for several inputs, and `keys` are the columns that tell
    output rows apart.
    """

    name: str
    blocks: Sequence[Block]
    columns: Sequence[str]
    keep: Callable[[pa.Table], pa.Table] | None
    actor: Callable[..., Any]
    arguments: Mapping[str, Any]
    outputs: Mapping[Any, Output]
    id_columns: Sequence[str]
    output_id: str
    input_ids: Callable[[pa.Table], Sequence[Any]] | None = None
    keys: Sequence[str] = ()


Counts = dict[Any, dict[str, Any]]
RunPass = Callable[[Pass], Counts]
"""What does a pass: `run_over` with the actors of a run."""


def missing_blocks(work: Pass) -> list[Block]:
    """The blocks that lack a part in any of their folders."""
    folders = [output.folder for output in work.outputs.values()]
    return [block for block in work.blocks if not all(has_part(folder, block.number) for folder in folders)]


_ADVICE = {
    "overflow": "float16 does not hold numbers that large. Pass --extraction.dtype bfloat16.",
    "not_finite": "The model itself gives NaN or infinite values. Pass --model.dtype float32, or get another copy of it.",
}


def checked(work: Pass, output: Output) -> dict[str, Any]:
    """The counts of a target's folder, after its parts have been compared with the input.

    Raises AuditError if rows are missing or there twice, UserError if no row came out.
    """
    keys = work.keys or [name for name in _KEYS if name in output.table_schema.names]
    inputs = output.inputs or Inputs(work.id_columns, work.input_ids, work.output_id)
    started = time.perf_counter()

    def kept_ids(table: pa.Table) -> Sequence[Any]:
        kept = table if work.keep is None else work.keep(table)
        return kept[inputs.columns[0]].to_pylist() if inputs.ids is None else inputs.ids(kept)

    audited = audit(
        folder=output.folder,
        blocks=work.blocks,
        input_columns=inputs.columns,
        input_ids=kept_ids,
        id_column=inputs.output_id,
        key_columns=keys,
    )
    counts = read_counts(output.folder) | audited
    counts["num_rejected"] = write_rejected(output.folder)
    counts["audit_seconds"] = round(time.perf_counter() - started, 3)
    if counts["rows"] == 0:
        raise UserError(
            f"{work.name}: nothing usable came out of {audited['audited_rows']} rows: {counts['rejected'] or 'no reason given'}. {_advice(counts['rejected'])}"
        )
    return counts


def _advice(rejected: Mapping[str, int]) -> str:
    """What mends the reason that most rows were rejected for."""
    reason = max(rejected, key=lambda name: rejected[name], default="")
    return _ADVICE.get(reason, "Look at the source.")
