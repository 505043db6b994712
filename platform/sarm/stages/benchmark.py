"""`jobs/evaluate.py --model`: benchmarks -> scores -> figures with intervals -> report, in one stage folder."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sarm.contracts.ids import hash_share
from sarm.contracts.manifest import StageFolder, finite_or_null, write_atomically
from sarm.data.tokens.contents import count_spelled_texts
from sarm.engine.mlflow.tracking import tracking_uri
from sarm.engine.ray.machine import machine_of
from sarm.engine.session import tracked_folder
from sarm.engine.terminal import say
from sarm.evaluate.benchmarks.sources import Loaded, load_benchmark, parse_source
from sarm.evaluate.benchmarks.suite import measure, metrics
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.passes.models import ModelSpec, check_tokenizer, find_model
from sarm.report.benchmark_page import build_page
from sarm.report.numbers import share, span
from sarm.report.pages import write_page
from sarm.settings.benchmarks import Benchmarking
from sarm.settings.budget import dtype_of
from sarm.settings.identity import as_json, identity
from sarm.stages.benchmark_overlap import TrainingPrompts, overlap, training_prompts
from sarm.stages.benchmark_scoring import Scores, all_cached, is_here, items_table, make_items, reasons_of, score_all
from sarm.stages.fitting import made_in, reading_budget

# v2: rows belong to one prompt if its normalised text is the same.
BENCHMARK = "benchmarks/v2"


def run_benchmarks(settings: Benchmarking) -> Path:
    """Score, measure and report; returns the folder. A finished folder of the same settings is left alone.

    Raises UserError for unusable settings, models or data, before a cluster starts and before anything is written.
    """
    tracking_uri(settings.run)
    is_here(settings.run, in_process=settings.in_process)
    settings, spec = _fitted(settings)
    benchmarks = [
        load_benchmark(parse_source(text), settings.limit, settings.allow_partial) for text in settings.benchmarks
    ]
    trained_on = training_prompts(spec)
    folder = StageFolder(settings.run.out, BENCHMARK, _identity(settings, spec, benchmarks, trained_on))
    if folder.finished():
        say(f"already done, {folder.folder}")
        return folder.folder
    started = time.monotonic()
    items, texts = make_items(benchmarks, settings.probes, settings.probe_rows)
    alone = sorted({item["completion_id"] for item in items if not item["variant"]}, key=hash_share)
    alone = alone[: settings.drift_items]
    if not all_cached(spec, texts, alone):
        check_tokenizer(spec)
    with tracked_folder(folder, settings.run) as own_run:
        own_run.log_config(json.loads(as_json(settings)))
        scores = score_all(spec, texts, alone, settings)
        table = items_table(items, scores)
        pq.write_table(table, folder.folder / "items.parquet", write_page_checksum=True)
        say(f"measuring {table.num_rows:,} scores")
        found = measure(table, settings.run.seed)
        for name, own in overlap(trained_on, benchmarks, table, settings.run.seed).items():
            found["benchmarks"][name]["near_duplicates"] = own
        content = _content(
            settings=settings,
            spec=spec,
            benchmarks=benchmarks,
            found=found,
            scores=scores,
            reasons=reasons_of(items, scores),
        )
        content["contents"] = count_spelled_texts(texts.values())
        if num := content["contents"]["contents_with_control_tokens"]:
            content["notes"].append(f"{num:,} contents spell control tokens, which {'count as such, as in the official code' if spec.protocol == 'official' else 'are scored as text'}.")  # fmt: skip
        if num := content["contents"]["contents_already_templated"]:
            content["notes"].append(f"{num:,} contents spell the turns of a chat template: they may have been templated before.")  # fmt: skip
        content["seconds"] = round(time.monotonic() - started, 2)
        write_atomically(folder.folder / "report.json", json.dumps(finite_or_null(content), indent=2, ensure_ascii=False, allow_nan=False))  # fmt: skip
        write_page(build_page(content), folder.folder)
        own_run.log_metrics(metrics(content))
        for name in ("report.json", "report.md", "report.html", "items.parquet"):
            own_run.log_artifact(folder.folder / name)
        counts = {
            key: content["scoring"][key] for key in ("num_cached", "num_scored", "forward_tokens", "forward_seconds")
        } | content["contents"]
        folder.finish({**counts, "seconds": content["seconds"]})
    _say_figures(content)
    say(f"report: {folder.folder / 'report.html'}")
    return folder.folder  # fmt: skip


def _fitted(settings: Benchmarking) -> tuple[Benchmarking, ModelSpec]:
    """The settings with dtype and tokens a pass for the run's device, and the model; a finished folder keeps the dtype that it was made in."""
    known = made_in(settings.run.out, "dtype") if settings.dtype == "auto" else settings.dtype
    device = machine_of(settings.run).device(settings.run.use_gpu)
    settings = replace(settings, dtype=known or dtype_of(device))
    spec = find_model(settings)
    place = Path(spec.place)
    budget = reading_budget(
        device, place if place.is_dir() else None, spec.max_length, settings.batch_tokens, spec.dtype
    )
    say(f"budget: passes of {budget.batch_tokens:,} tokens in {budget.dtype}")
    return replace(settings, batch_tokens=budget.batch_tokens), spec


def _identity(
    settings: Benchmarking, spec: ModelSpec, benchmarks: Sequence[Loaded], trained_on: TrainingPrompts | None
) -> dict[str, Any]:
    """What decides the result: the model's and the data's contents rather than their places."""
    fields = {key: value for key, value in identity(settings, seed=settings.run.seed).items() if key not in ("run", "model", "revision", "benchmarks", "edit")}  # fmt: skip
    return {
        **fields,
        "model": spec.identity,
        "template": spec.template,
        "max_length": spec.max_length,
        "training_prompts": "unknown" if trained_on is None else trained_on.digest,
        "protocol_version": PROTOCOL_VERSION,
        "benchmarks": {one.source.name: one.digest for one in benchmarks},
    }


def _content(
    settings: Benchmarking,
    spec: ModelSpec,
    benchmarks: Sequence[Loaded],
    found: dict[str, Any],
    scores: Scores,
    reasons: Mapping[tuple[str, str], str],
) -> dict[str, Any]:
    for name, own in found["benchmarks"].items():
        for row in own["unscored"]:
            row["reason"] = reasons.get((name, row["where"]), row["reason"])
    for one in benchmarks:
        own = found["benchmarks"][one.source.name]
        own["source"], own["digest"], own["num_read"] = one.source.place, one.digest, one.num_read
        own["left_out"] = [{"where": bad.where, "reason": bad.reason} for bad in one.bad]
    rate = scores.forward_tokens / scores.forward_seconds if scores.forward_seconds else None
    return {
        "title": f"Benchmarks of {settings.model}",
        "model": {"name": settings.model, "protocol_version": PROTOCOL_VERSION, **spec.__dict__},
        "facts": {
            "model": settings.model,
            "protocol": spec.protocol,
            "protocol version": PROTOCOL_VERSION,
            "max length": spec.max_length,
            "dtype": spec.dtype,
            "template": spec.template or "none",
            "weights": spec.identity[:12],
            "seed": settings.run.seed,
        },
        "notes": _notes(settings, found, benchmarks),
        "scoring": {**{key: value for key, value in scores._asdict().items() if key != "by_id"}, "batch_tokens": settings.batch_tokens, "tokens_per_second": rate},
        **found,
    }  # fmt: skip


def _notes(settings: Benchmarking, found: dict[str, Any], benchmarks: Sequence[Loaded]) -> list[str]:
    notes = []
    for one in benchmarks:
        own = found["benchmarks"][one.source.name]
        missing = [f"{subset} {have}" for subset, have in own["coverage"].items() if len(set(have.split(" of "))) > 1]
        if missing:
            notes.append(f"{one.source.name} is partial: {', '.join(missing)} rows. Its overall is the mean of what is there, not the published figure.")  # fmt: skip
        if num := len(one.bad) + len(own["unscored"]):
            notes.append(f"{one.source.name}: {num} of {one.num_read} rows are left out, see the end.")
        if own["num_truncated"]:
            what = "lost tokens at the tokenizer's truncation side, which may be the rewarded one" if settings.protocol == "official" else "lost their beginning"  # fmt: skip
            notes.append(f"{one.source.name}: {own['num_truncated']} of {own['num_completions']} completions were longer than the model reads and {what}.")  # fmt: skip
        notes.append(_near_duplicates(one.source.name, own["near_duplicates"]))
    if drift := found["drift"]:
        in_std = f" ({drift['max_in_std']:.1e} of the scores' standard deviation)" if drift["max_in_std"] is not None else ""  # fmt: skip
        notes.append(f"Scored alone, {drift['num_completions']} completions moved by at most {drift['max']:.2e}{in_std}.")  # fmt: skip
    return notes


def _near_duplicates(name: str, near: dict[str, Any]) -> str:
    if near["training_prompts"] is None:
        return f"{name}: whether its prompts are nearly those that the model was trained on is unknown. The training pairs do not lie beside the model."
    said = f"{name}: {near['prompts']} of {near['of_prompts']} prompts ({near['rows']} of {near['of_rows']} rows) are near-duplicates of one of the {near['training_prompts']:,} training prompts."
    if not near["rows"]:
        return said
    parts = [f"{figure} {share(row['value'])} ({span(row['ci95'])})" for figure, row in near["without"].items()]
    return f"{said} Without them: {', '.join(parts) or 'no row is left'}."


def _say_figures(content: dict[str, Any]) -> None:
    for name, one in content["benchmarks"].items():
        for figure, row in one["figures"].items():
            if "/" not in figure:
                say(f"{name:<15} {figure:<18} {share(row['value']):>8}   95 % {span(row['ci95'])}")
