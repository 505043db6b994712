"""Scores of all completions of some benchmarks: what the cache has, and the rest through a pool of actors.

The cache holds a score under (model, template, protocol, length, dtype) and the texts, so benchmarks that share rows, partial
files and interrupted runs all use what is there. Every block of prompts is written when it is done.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from sarm.contracts.ids import hash_share, prompt_key_of, stable_id
from sarm.contracts.tables import ITEMS_TABLE
from sarm.data.sources.cache import cache_root
from sarm.engine.terminal import say
from sarm.evaluate.benchmarks.benchmark import BenchmarkRow
from sarm.evaluate.benchmarks.probes import edit_conversation, markup_count
from sarm.evaluate.benchmarks.sources import Loaded
from sarm.passes.models import ALONE, ModelSpec, score_key
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.checks import UserError
from sarm.settings.extras import is_installed, said_of
from sarm.settings.run import RunSettings

if TYPE_CHECKING:
    from sarm.engine.passes import RunPass


class Scores(NamedTuple):
    """Scores by completion id, and what scoring cost: completions taken from the cache and scored, tokens and seconds of the latter."""

    by_id: dict[str, dict[str, Any]]
    num_cached: int
    num_scored: int
    forward_tokens: int
    forward_seconds: float


def make_items(
    benchmarks: Sequence[Loaded], probes: Sequence[str], probe_rows: int
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """The rows of ITEMS without their scores, and the prompt (as JSON) and text of every distinct completion id."""
    items: list[dict[str, Any]] = []
    texts: dict[str, tuple[str, str]] = {}
    for loaded in benchmarks:
        for row in loaded.rows:
            items += _items_of(row, "", texts)
        edited = sorted(loaded.rows, key=lambda row: hash_share(f"{row.subset}/{row.row_id}"))[:probe_rows]
        for probe in probes:
            for row in edited:
                items += _items_of(row, probe, texts)
    return items, texts


def all_cached(spec: ModelSpec, texts: dict[str, tuple[str, str]], alone: Sequence[str]) -> bool:
    """Whether `score_all` would need no model."""
    known = _cached(cache_root() / "scores" / score_key(spec))
    return all(key in known for key in (*texts, *(f"{one}{ALONE}" for one in alone)))


def score_all(
    spec: ModelSpec,
    texts: dict[str, tuple[str, str]],
    alone: Sequence[str],
    settings: Benchmarking,
) -> Scores:
    """The score of every completion; those in `alone` once more in a pass of their own, under their id and `:alone`."""
    folder = cache_root() / "scores" / score_key(spec)
    wanted = [*texts, *(f"{one}{ALONE}" for one in alone)]
    known = _cached(folder)
    missing = [key for key in wanted if key not in known]
    num_cached = len(wanted) - len(missing)
    tokens, seconds = 0, 0.0
    if missing:
        # Only here: a run whose scores are all cached starts neither Ray nor torch.
        from sarm.data.store.parts import read_parts
        from sarm.stages.completion_scores import score_requests

        say(f"scoring {len(missing):,} completions with {spec.place} ({num_cached:,} are in the cache)")
        asked = [(*texts[key.removesuffix(ALONE)], key) for key in missing]
        with _workers(settings.run, in_process=settings.in_process) as run_pass:
            part, refused = score_requests(
                spec=spec, wanted=asked, cache=folder, batch_tokens=settings.batch_tokens, run_pass=run_pass
            )
        fresh = read_parts(part)
        fresh = fresh.filter(pc.is_in(fresh["completion_id"], value_set=pa.array(missing)))
        # What made the model fail has no row, so that the next run tries it again.
        known |= _by_id(fresh) | {key: _failed(refused[key]) for key in missing if key in refused}
        tokens = round(sum(fresh["forward_tokens"].to_pylist()))
        if spans := list(zip(fresh["started"].to_pylist(), fresh["seconds"].to_pylist(), strict=True)):
            seconds = max(began + took for began, took in spans) - min(began for began, _ in spans)
    return Scores(
        by_id={key: known[key] for key in wanted},
        num_cached=num_cached,
        num_scored=len(missing),
        forward_tokens=tokens,
        forward_seconds=seconds,
    )


def is_here(run: RunSettings, *, in_process: bool) -> bool:
    """Whether this process does the scoring: it is asked to, or Ray is not installed. Raises UserError if a cluster is named all the same."""
    if not in_process and is_installed("ray"):
        return False
    if run.ray_address:
        reason = "--in-process is asked for as well" if in_process else said_of("train", "ray")
        raise UserError(f"--ray-address {run.ray_address} names a cluster, and {reason}.")
    return True


@contextlib.contextmanager
def _workers(run: RunSettings, *, in_process: bool) -> "Iterator[RunPass]":
    """Who does the pass: the actors of the run's cluster, or this process."""
    if is_here(run, in_process=in_process):
        from sarm.engine.in_process import run_here

        say("scoring in this process, without Ray")
        yield functools.partial(run_here, threads=run.cpus_per_worker)
        return
    from sarm.engine.ray.cluster import connect
    from sarm.engine.ray.look import look_at_devices, tell
    from sarm.engine.ray.passes import run_over

    with connect(run) as cluster:
        tell(look_at_devices(cluster, run))
        yield lambda work: run_over(work, run, cluster)


def items_table(items: Iterable[dict[str, Any]], scores: Scores) -> pa.Table:
    """ITEMS with the scores filled in; a score that is not a finite number stays as it is, for the report to count."""
    rows = []
    for item in items:
        found = scores.by_id[item["completion_id"]]
        alone = scores.by_id.get(item["completion_id"] + ALONE, {}).get("score") if not item["variant"] else None
        rows.append(
            {
                **item,
                "score": found["score"],
                "num_tokens": found["num_tokens"],
                "truncated": found["was_truncated"],
                "score_alone": alone,
            }
        )
    return pa.Table.from_pylist(rows, schema=ITEMS_TABLE)


def reasons_of(items: Iterable[dict[str, Any]], scores: Scores) -> dict[tuple[str, str], str]:
    """Why rows have a completion that could not be encoded, by benchmark and `subset/row`."""
    found = ((item, scores.by_id[item["completion_id"]].get("reason")) for item in items)
    return {(item["benchmark"], f"{item['subset']}/{item['row_id']}"): reason for item, reason in found if reason}


def _items_of(row: BenchmarkRow, variant: str, texts: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    items = []
    for place, text in enumerate(row.completions):
        prompt: Sequence[dict[str, str]] = row.prompt
        if variant:
            prompt, text = edit_conversation(variant, prompt, text)
        packed = prompt_key_of(prompt)
        completion_id = stable_id(packed, text)
        texts.setdefault(completion_id, (packed, text))
        items.append(
            {
                "benchmark": row.benchmark,
                "subset": row.subset,
                "row_id": row.row_id,
                "variant": variant,
                "completion": place,
                "correct": place < row.num_correct,
                "cluster": row.cluster,
                "completion_id": completion_id,
                "num_chars": len(text),
                "markup": markup_count(text),
            }
        )
    return items


def _cached(folder: Path) -> dict[str, dict[str, Any]]:
    files = []
    for path in sorted(folder.glob("*/part-*.parquet")):
        try:
            pq.read_metadata(path)
        except (pa.ArrowException, OSError):
            continue  # torn by a full disk: its completions are scored again
        files.append(str(path))
    return _by_id(ds.dataset(files).to_table()) if files else {}


def _failed(reason: str) -> dict[str, Any]:
    return {"score": math.nan, "num_tokens": None, "was_truncated": False, "reason": reason}


def _by_id(table: pa.Table) -> dict[str, dict[str, Any]]:
    columns = ["completion_id", "score", "num_tokens", "was_truncated", "reason"]
    return {row["completion_id"]: row for row in table.select(columns).to_pylist()}
