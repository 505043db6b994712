"""The codes stage of an audit: every response through the SARM once, on the cluster, into codes/v2."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sarm.audit.codes import CODE_PAIRS, RESPONSES
from sarm.contracts.ids import response_id_of
from sarm.contracts.passes import SPELLED_COUNTS
from sarm.data.store.blocks import table_blocks
from sarm.data.store.parts import part_files
from sarm.engine.passes import Pass, RunPass
from sarm.engine.ray.block_actor import Output
from sarm.passes.codes import CODES_PART, ResponseCodes
from sarm.passes.reader import Reader
from sarm.report.dictionary_note import dictionary_note

_BLOCK_ROWS = 64


def write_codes(pairs: pa.Table, reader: Reader, folder: Path, run_pass: RunPass) -> Mapping[str, Any]:
    """Encode every distinct response of AUDIT_PAIRS and write `responses.parquet` and `pairs.parquet`; returns counts.

    What a run that was killed has left in the folder is gone on with. Raises UserError if no pair can be encoded.
    """
    parts = folder / "parts"
    work = Pass(
        name="codes",
        blocks=table_blocks(pairs, parts / "pairs.parquet", _BLOCK_ROWS),
        columns=pairs.column_names,
        keep=None,
        actor=ResponseCodes,
        arguments={"reader": reader},
        outputs={"responses": Output(parts / "responses", CODES_PART)},
        id_columns=("pair_id",),
        output_id="pair_ids",
        keys=("response_id",),
    )
    counts = run_pass(work)["responses"]
    files = [str(path) for path in part_files(parts / "responses")]
    table = ds.dataset(files).to_table(columns=RESPONSES.names).replace_schema_metadata(None)
    # A prompt whose pairs fell into two batches has responses in both.
    first = {response_id: row for row, response_id in reversed(list(enumerate(table["response_id"].to_pylist())))}
    responses = table.take(sorted(first.values()))
    pq.write_table(responses, folder / "responses.parquet", write_page_checksum=True)
    rows = pairs.to_pylist()
    ids = [{f"{side}_id": response_id_of(row["prompt"], row[side]) for side in ("chosen", "rejected")} for row in rows]
    named = [{**row, **own} for row, own in zip(rows, ids, strict=True)]
    has_codes = [row["chosen_id"] in first and row["rejected_id"] in first for row in named]
    kept = [row for row, is_kept in zip(named, has_codes, strict=True) if is_kept]
    pq.write_table(pa.Table.from_pylist(kept, schema=CODE_PAIRS), folder / "pairs.parquet", write_page_checksum=True)
    shutil.rmtree(parts)
    return {
        "responses": responses.num_rows,
        "pairs": len(kept),
        "rejected": counts["rejected"],
        **{name: counts.get(name, 0) for name in SPELLED_COUNTS},
        "notes": dictionary_note(reader.model.config.provenance),
    }
