"""The scoring pass: requests of one prompt each through a pool of actors that hold the reward model, into Parquet.

Each pass has a folder of its own in the cache, with what it was asked for beside its parts. A pass that was killed goes on in its own
blocks, and so in its own batches: its scores are to the bit those of a pass that nothing disturbed.
"""

import contextlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.tables import COMPLETION_SCORES_TABLE
from sarm.data.sources.tool_turns import MORE
from sarm.data.store.blocks import Block, blocks_of, table_blocks
from sarm.data.store.parts import has_part, read_rejects
from sarm.engine.ray.block_actor import Output
from sarm.engine.ray.passes import Pass, RunPass
from sarm.engine.writer_lock import HeldError, WriterLock
from sarm.passes.completions import REQUESTS, CompletionScores
from sarm.passes.models import ALONE, ModelSpec

# Prompts of one block: enough for rows of like length, few enough that a killed run loses little.
BLOCK_PROMPTS = 8
_ASKED = "requests.parquet"


def score_requests(
    spec: ModelSpec, wanted: Sequence[tuple[str, str, str]], cache: Path, batch_tokens: int, run_pass: RunPass
) -> tuple[Path, dict[str, str]]:
    """Score each (prompt as JSON, completion, id) into a folder of COMPLETION_SCORES under `cache`; returns it, and why ids have no score.

    A pass that lacks just these ids is gone on with, unless another process is at it.
    """
    ids = {key for *_, key in wanted}
    with contextlib.ExitStack() as locks:
        for folder in sorted(path.parent for path in cache.glob(f"*/{_ASKED}")):
            with contextlib.suppress(HeldError):
                if _lacking(folder) == ids:
                    locks.enter_context(WriterLock(folder, "score"))
                    break
        else:
            folder = cache / uuid.uuid4().hex
            locks.enter_context(WriterLock(folder, "score"))
            table_blocks(requests_of(wanted), folder / _ASKED, BLOCK_PROMPTS)
        work = Pass(
            name="score",
            blocks=blocks_of(folder / _ASKED, BLOCK_PROMPTS),
            columns=REQUESTS.names,
            keep=None,
            actor=CompletionScores,
            arguments={"spec": spec, "batch_tokens": batch_tokens},
            outputs={"scores": Output(folder, COMPLETION_SCORES_TABLE)},
            id_columns=("ids",),
            input_ids=ids_of,
            output_id="completion_id",
        )
        run_pass(work)
    return folder, {reject["completion_id"]: reject["reject"] for reject in read_rejects(folder)}


def requests_of(wanted: Sequence[tuple[str, str, str]]) -> pa.Table:
    """REQUESTS of one prompt each, from long to short so that a block holds rows of like length."""
    groups: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for prompt, text, key in wanted:
        groups.setdefault((prompt, key.endswith(ALONE)), []).append((key, text))
    requests: list[dict[str, Any]] = [
        {
            "prompt": json.dumps(
                [dict(zip(("role", "content", MORE), one, strict=False)) for one in json.loads(prompt)]
            ),
            "completions": [text for _, text in own],
            "ids": [key for key, _ in own],
            "alone": alone,
        }
        for (prompt, alone), own in groups.items()
    ]
    requests.sort(key=lambda r: (r["alone"], -len(r["prompt"]) - sum(map(len, r["completions"]))))
    return pa.Table.from_pylist(requests, schema=REQUESTS)


def _lacking(folder: Path) -> set[str]:
    """The ids of the blocks of a pass that are not done."""
    try:
        blocks = blocks_of(folder / _ASKED, BLOCK_PROMPTS)
        missing = [block for block in blocks if not has_part(folder, block.number)]
        asked = pq.read_table(folder / _ASKED, columns=["ids"]) if missing else None
    except (OSError, pa.ArrowException):
        return set()  # torn by a full disk: its completions are asked for again
    return {key for block in missing if asked is not None for key in ids_of(_rows(asked, block))}


def _rows(table: pa.Table, block: Block) -> pa.Table:
    return table.slice(block.start, block.num_rows)


def ids_of(table: pa.Table) -> list[str]:
    """The completion ids of REQUESTS, in their order."""
    ids: list[str] = pc.list_flatten(table.column("ids")).to_pylist()
    return ids
