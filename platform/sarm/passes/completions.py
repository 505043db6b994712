"""What actors compute to score completions: requests of one prompt each in, a row for each completion out."""

import json
import time
from typing import Any

import pyarrow as pa
import torch

from sarm.contracts.passes import Beat, Cost, Tables
from sarm.contracts.tables import COMPLETION_SCORES_TABLE
from sarm.data.store.parts import with_sink_columns
from sarm.passes.models import ModelSpec
from sarm.passes.scorers import load_scorer
from sarm.passes.scoring import Request

REQUESTS = pa.schema(
    [
        pa.field("prompt", pa.string()),
        pa.field("completions", pa.list_(pa.string())),
        pa.field("ids", pa.list_(pa.string())),
        pa.field("alone", pa.bool_()),
    ]
)


class CompletionScores:
    """A table of REQUESTS in, one row of COMPLETION_SCORES a completion out, under the one target `scores`."""

    def __init__(self, spec: ModelSpec, batch_tokens: int, threads: int):
        torch.set_num_threads(threads)
        self._score = load_scorer(spec, batch_tokens)

    def prepare(self, table: pa.Table) -> list[dict[str, Any]]:
        """The requests; scorers tokenise themselves, each by its own protocol."""
        requests: list[dict[str, Any]] = table.to_pylist()
        return requests

    def compute(self, prepared: list[dict[str, Any]], beat: Beat) -> tuple[Tables, Cost]:
        """The scores of all completions, NaN with a reason for those that cannot be encoded."""
        started = time.time()
        requests = [Request(json.loads(r["prompt"]), r["completions"], r["alone"]) for r in prepared]
        scored, cost = self._score(requests)
        beat()
        num = sum(len(own) for own in scored)
        took = {"started": started, "seconds": time.time() - started, "forward_tokens": cost.tokens / max(1, num)}
        rows = [
            {
                "completion_id": completion_id,
                "score": one.score,
                "num_tokens": one.num_tokens,
                "was_truncated": one.truncated,
                "reason": one.reason,
                **took,
                "truncated": one.truncated,
            }
            for request, own in zip(prepared, scored, strict=True)
            for completion_id, one in zip(request["ids"], own, strict=True)
        ]
        return _tables(rows), cost

    def rejected(self, table: pa.Table, reason: str) -> Tables:
        """What is left of requests that cannot be scored."""
        blank = {"was_truncated": False, "truncated": False, "started": 0.0, "seconds": 0.0, "forward_tokens": 0.0}
        ids = [completion_id for own in table["ids"].to_pylist() for completion_id in own]
        return _tables([{**blank, "completion_id": completion_id, "reject": reason} for completion_id in ids])


def _tables(rows: list[dict[str, Any]]) -> Tables:
    return {"scores": pa.Table.from_pylist(rows, schema=with_sink_columns(COMPLETION_SCORES_TABLE))}
