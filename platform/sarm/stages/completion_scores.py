"""The scoring pass: requests of one prompt each through a pool of actors that hold the reward model, into Parquet."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from sarm.contracts.tables import COMPLETION_SCORES_TABLE
from sarm.data.store.parts import with_sink_columns
from sarm.engine.ray.cluster import connect
from sarm.engine.ray.parquet_sink import ParquetSink
from sarm.engine.ray.passes import through_actors
from sarm.passes.actor_progress import Progress, Source
from sarm.passes.models import ALONE, ModelSpec
from sarm.passes.scorers import Request, load_scorer
from sarm.settings.run import RunSettings

# Prompts of one batch of an actor: enough for rows of like length, few enough that a killed run loses little.
BATCH_PROMPTS = 8
_REQUESTS = pa.schema(
    [
        pa.field("prompt", pa.string()),
        pa.field("completions", pa.list_(pa.string())),
        pa.field("ids", pa.list_(pa.string())),
        pa.field("alone", pa.bool_()),
    ]
)


class CompletionScores:
    """A batch of requests in, one row per completion out."""

    def __init__(self, spec: ModelSpec, batch_tokens: int, source: Source, threads: int):
        torch.set_num_threads(threads)
        self._score = load_scorer(spec, batch_tokens)
        self._progress = Progress(source)

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.time()
        records = batch.to_pylist()
        requests = [Request(json.loads(r["prompt"]), r["completions"], r["alone"]) for r in records]
        scored, num_tokens = self._score(requests)
        self._progress.add(batch.num_rows, num_tokens)
        num = sum(len(own) for own in scored)
        cost = {"started": started, "seconds": time.time() - started, "forward_tokens": num_tokens / max(1, num)}
        rows = [
            {
                "completion_id": completion_id,
                "score": one.score,
                "num_tokens": one.num_tokens,
                "was_truncated": one.truncated,
                "reason": one.reason,
                **cost,
                "reject": None,
                "truncated": one.truncated,
            }
            for record, own in zip(records, scored, strict=True)
            for completion_id, one in zip(record["ids"], own, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=with_sink_columns(COMPLETION_SCORES_TABLE))


def score_requests(
    spec: ModelSpec, wanted: Sequence[tuple[str, str, str]], folder: Path, batch_tokens: int, run: RunSettings
) -> None:
    """Score each (prompt as JSON, completion, id) into Parquet files of COMPLETION_SCORES, one a batch, written as batches finish."""
    blocks = list(_blocks(wanted))
    source = Source("score", sum(block.num_rows for block in blocks))
    with connect(run) as cluster:
        through_actors(
            blocks,
            BATCH_PROMPTS,
            CompletionScores,
            {"spec": spec, "batch_tokens": batch_tokens, "source": source},
            ParquetSink(folder, COMPLETION_SCORES_TABLE, 1),
            run,
            cluster,
        )


def _blocks(wanted: Sequence[tuple[str, str, str]]) -> Iterable[pa.Table]:
    """Requests of one prompt each, from long to short so that a batch holds rows of like length, in blocks of one batch."""
    groups: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for prompt, text, key in wanted:
        groups.setdefault((prompt, key.endswith(ALONE)), []).append((key, text))
    requests: list[dict[str, Any]] = [
        {
            "prompt": json.dumps([{"role": role, "content": content} for role, content in json.loads(prompt)]),
            "completions": [text for _, text in own],
            "ids": [key for key, _ in own],
            "alone": alone,
        }
        for (prompt, alone), own in groups.items()
    ]
    requests.sort(key=lambda r: (r["alone"], -len(r["prompt"]) - sum(map(len, r["completions"]))))
    for chunk in (requests[i : i + BATCH_PROMPTS] for i in range(0, len(requests), BATCH_PROMPTS)):
        yield pa.Table.from_pylist(chunk, schema=_REQUESTS)
