"""Scores of all completions of some benchmarks: what the cache has, and the rest through a pool of actors.

The cache holds a score under (model, template, protocol, length, dtype) and the texts, so benchmarks that share rows, partial
files and interrupted runs all use what is there. Every batch is written when it is done.
"""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray.data
import torch

from sarm import schema
from sarm.config import Run
from sarm.data.benchmark_sources import Loaded, cluster_of
from sarm.data.benchmarks import BenchmarkRow
from sarm.data.cache import cache_root
from sarm.evaluate.probes import edit_conversation, markup_count
from sarm.runtime.actors import Progress, Source, device_of_worker
from sarm.runtime.cluster import connect
from sarm.runtime.extraction import through_actors
from sarm.runtime.models import score_key
from sarm.runtime.parquet_sink import ParquetSink
from sarm.runtime.scorers import ModelSpec, Request, load_scorer
from sarm.runtime.session import say

# Prompts of one batch of an actor: enough for rows of like length, few enough that a killed run loses little.
BATCH_PROMPTS = 8
_ALONE = ":alone"
_REQUESTS = pa.schema(
    [
        pa.field("prompt", pa.string()),
        pa.field("completions", pa.list_(pa.string())),
        pa.field("ids", pa.list_(pa.string())),
        pa.field("alone", pa.bool_()),
    ]
)


class Scores(NamedTuple):
    """Scores by completion id, and what scoring cost: completions taken from the cache and scored, tokens and seconds of the latter."""

    by_id: dict[str, dict[str, Any]]
    num_cached: int
    num_scored: int
    forward_tokens: int
    forward_seconds: float


class CompletionScores:
    """A batch of requests in, one row per completion out."""

    def __init__(self, spec: ModelSpec, batch_tokens: int, source: Source, threads: int):
        torch.set_num_threads(threads)
        self._score = load_scorer(spec, batch_tokens, device_of_worker())
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
                **cost,
                "reject": None,
                "truncated": one.truncated,
            }
            for record, own in zip(records, scored, strict=True)
            for completion_id, one in zip(record["ids"], own, strict=True)
        ]
        sink_columns = [pa.field("reject", pa.string()), pa.field("truncated", pa.bool_())]
        return pa.Table.from_pylist(rows, schema=pa.schema([*schema.COMPLETION_SCORES, *sink_columns]))


def make_items(
    benchmarks: Sequence[Loaded], probes: Sequence[str], probe_rows: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """The rows of ITEMS without their scores, and the prompt (as JSON) and text of every distinct completion id."""
    items: list[dict[str, Any]] = []
    texts: dict[str, tuple[str, str]] = {}
    for loaded in benchmarks:
        for row in loaded.rows:
            items += _items_of(row, "", texts)
        edited = sorted(loaded.rows, key=lambda row: schema.hash_share(f"{row.subset}/{row.row_id}"))[:probe_rows]
        for probe in probes:
            for row in edited:
                items += _items_of(row, probe, texts)
    return items, texts


def score_all(
    spec: ModelSpec,
    texts: dict[str, tuple[str, str]],
    alone: Sequence[str],
    batch_tokens: int,
    run: Run,
) -> Scores:
    """The score of every completion; those in `alone` once more in a pass of their own, under their id and `:alone`."""
    folder = cache_root() / "scores" / score_key(spec)
    wanted = [*texts, *(f"{one}{_ALONE}" for one in alone)]
    known = _cached(folder) if folder.exists() else {}
    missing = [key for key in wanted if key not in known]
    num_cached = len(wanted) - len(missing)
    tokens, seconds = 0, 0.0
    if missing:
        say(f"scoring {len(missing):,} completions with {spec.place} ({num_cached:,} are in the cache)")
        part = folder / uuid.uuid4().hex
        blocks = list(_blocks(missing, texts))
        num_requests = sum(block.num_rows for block in blocks)
        with connect(run) as cluster:
            through_actors(
                ray.data.from_arrow(blocks),
                BATCH_PROMPTS,
                Source("score", num_requests),
                CompletionScores,
                {"spec": spec, "batch_tokens": batch_tokens},
                ParquetSink(part, schema.COMPLETION_SCORES, 1),
                run,
                cluster,
            )
        fresh = ds.dataset([str(path) for path in sorted(part.glob("*.parquet"))]).to_table()
        known |= _by_id(fresh)
        started, took = fresh["started"].to_pylist(), fresh["seconds"].to_pylist()
        tokens = round(sum(fresh["forward_tokens"].to_pylist()))
        seconds = max(a + b for a, b in zip(started, took, strict=True)) - min(started)
    return Scores({key: known[key] for key in wanted}, num_cached, len(missing), tokens, seconds)


def items_table(items: Iterable[dict[str, Any]], scores: Scores) -> pa.Table:
    """ITEMS with the scores filled in; a score that is not a finite number stays as it is, for the report to count."""
    rows = []
    for item in items:
        found = scores.by_id[item["completion_id"]]
        alone = scores.by_id.get(item["completion_id"] + _ALONE, {}).get("score") if not item["variant"] else None
        rows.append(
            {
                **item,
                "score": found["score"],
                "num_tokens": found["num_tokens"],
                "truncated": found["was_truncated"],
                "score_alone": alone,
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.ITEMS)


def _items_of(row: BenchmarkRow, variant: str, texts: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    items = []
    for place, text in enumerate(row.completions):
        prompt: Sequence[dict[str, str]] = row.prompt
        if variant:
            prompt, text = edit_conversation(variant, prompt, text)
        packed = json.dumps([[message["role"], message["content"]] for message in prompt], ensure_ascii=False)
        completion_id = schema.stable_id(packed, text)
        texts.setdefault(completion_id, (packed, text))
        items.append(
            {
                "benchmark": row.benchmark,
                "subset": row.subset,
                "row_id": row.row_id,
                "variant": variant,
                "completion": place,
                "correct": place < row.num_correct,
                "cluster": cluster_of(row),
                "completion_id": completion_id,
                "num_chars": len(text),
                "markup": markup_count(text),
            }
        )
    return items


def _blocks(missing: Sequence[str], texts: dict[str, tuple[str, str]]) -> Iterable[pa.Table]:
    """Requests of one prompt each, from long to short so that a batch holds rows of like length, in blocks of one batch."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for key in missing:
        alone = key.endswith(_ALONE)
        groups.setdefault((texts[key.removesuffix(_ALONE)][0], alone), []).append(key)
    requests: list[dict[str, Any]] = [
        {
            "prompt": json.dumps([{"role": role, "content": content} for role, content in json.loads(prompt)]),
            "completions": [texts[key.removesuffix(_ALONE)][1] for key in keys],
            "ids": keys,
            "alone": alone,
        }
        for (prompt, alone), keys in groups.items()
    ]
    requests.sort(key=lambda r: (r["alone"], -len(r["prompt"]) - sum(map(len, r["completions"]))))
    for chunk in (requests[i : i + BATCH_PROMPTS] for i in range(0, len(requests), BATCH_PROMPTS)):
        yield pa.Table.from_pylist(chunk, schema=_REQUESTS)


def _cached(folder: Path) -> dict[str, dict[str, Any]]:
    files = []
    for path in sorted(folder.glob("*/*.parquet")):
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError):
            continue  # torn by a full disk: its completions are scored again
        files.append(str(path))
    return _by_id(ds.dataset(files).to_table()) if files else {}


def _by_id(table: pa.Table) -> dict[str, dict[str, Any]]:
    columns = ["completion_id", "score", "num_tokens", "was_truncated"]
    return {row["completion_id"]: row for row in table.select(columns).to_pylist()}
