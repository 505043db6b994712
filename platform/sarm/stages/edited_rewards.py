"""Rewards of a classifier under edits of its dictionary's codes, for the responses of some pairs, on the cluster."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from jaxtyping import Float

from sarm.data.store.blocks import table_blocks
from sarm.data.store.parts import part_files
from sarm.engine.passes import Pass, RunPass
from sarm.engine.ray.block_actor import Output
from sarm.passes.attached_model import AttachedReader
from sarm.passes.edited_rewards import EDITED, CodeEdit, EditedRewards

_BLOCK_ROWS = 64


class EffectsOfEdits(NamedTuple):
    """By response (rows in the order asked for) and edit: changes of rewards; NaN for a response that could not be read."""

    patched: Float[np.ndarray, "responses edits"]
    linear: Float[np.ndarray, "responses edits"]
    terms: Float[np.ndarray, "responses latents"]
    """Of the edits that are taken apart, one after the other, their latents' terms."""
    places: Float[np.ndarray, "responses apart"]


def effects_of_edits(
    pairs: pa.Table,
    response_ids: Sequence[str],
    reader: AttachedReader,
    edits: Sequence[CodeEdit],
    folder: Path,
    run_pass: RunPass,
) -> EffectsOfEdits:
    """Run every distinct response of AUDIT_PAIRS once for each edit. What a run that was killed has left in the folder is gone on with."""
    parts = folder / "parts"
    work = Pass(
        name="edits inside",
        blocks=table_blocks(pairs, parts / "pairs.parquet", _BLOCK_ROWS),
        columns=pairs.column_names,
        keep=None,
        actor=EditedRewards,
        arguments={"reader": reader, "edits": list(edits)},
        outputs={"edited": Output(parts / "edited", EDITED)},
        id_columns=("pair_id",),
        output_id="pair_ids",
        keys=("response_id",),
    )
    run_pass(work)
    files = [str(path) for path in part_files(parts / "edited")]
    table = ds.dataset(files).to_table(columns=["response_id", *EffectsOfEdits._fields])
    place = {response_id: row for row, response_id in enumerate(response_ids)}
    apart = [edit for edit in edits if edit.apart]
    widths = (len(edits), len(edits), sum(len(edit.latents) for edit in apart), len(apart))
    found = EffectsOfEdits(*(np.full((len(response_ids), width), np.nan) for width in widths))
    for row in table.to_pylist():
        for name, into in found._asdict().items():
            into[place[row["response_id"]]] = row[name]
    shutil.rmtree(parts)
    return found
