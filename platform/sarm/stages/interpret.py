"""`jobs/interpret.py`: contexts/v1 -> explanations, their tests and ratings -> explanations/v1, report, MLflow."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.folders import CONTEXTS_FOLDER, EVALUATION_FOLDER, EXPLANATIONS_FOLDER
from sarm.contracts.manifest import MANIFEST, StageFolder
from sarm.engine.llm.endpoint import JudgeStoppedError
from sarm.engine.llm.judge import open_judges
from sarm.engine.mlflow.tracking import tracking_uri
from sarm.engine.session import tracked_folder
from sarm.engine.terminal import say
from sarm.interpret import questions
from sarm.interpret.context_store import ContextStore, load_contexts
from sarm.interpret.sampling import Pool
from sarm.interpret.silence import scored_texts
from sarm.settings.checks import UserError
from sarm.settings.identity import as_json, identity
from sarm.settings.judging import Interpret
from sarm.stages.explanations_folder import write_explanations, write_report
from sarm.stages.interpret_latents import interpret_latents

POOL_FILE = "pool.parquet"


def run_interpretation(settings: Interpret) -> Path:
    """Explain, score, rate and report; returns the folder. A finished folder of the same settings is left alone.

    Raises UserError for unusable settings or contexts, and JudgeStoppedError where a judge cannot be asked any more; the same command then
    goes on with what was not answered yet.
    """
    tracking_uri(settings.run)
    store = load_contexts(settings.contexts)
    latents = _latents(settings, store)
    config = {**identity(settings), "judging": identity(settings.judging), "prompts": questions.prompt_versions()}
    config = {key: value for key, value in config.items() if key not in ("run", "contexts", "scored")}
    inputs = {CONTEXTS_FOLDER: (settings.contexts, CONTEXTS_FOLDER)}
    if settings.scored is not None:
        inputs[EVALUATION_FOLDER] = (settings.scored / "evaluation", EVALUATION_FOLDER)
    folder = StageFolder(settings.run.out, EXPLANATIONS_FOLDER, config, inputs)
    if done := folder.finished():
        if not (settings.judging.retry_failed and done.counts["failed"]):
            say(f"already done, {folder.folder}")
            return folder.folder
        say(f"asking again what failed: {done.counts['failed']} answers")
    return asyncio.run(
        _run(settings=settings, store=store, pool=_pool(settings, store), latents=latents, folder=folder)
    )


async def _run(
    settings: Interpret, store: ContextStore, pool: Pool, latents: Sequence[int], folder: StageFolder
) -> Path:
    started = time.monotonic()
    judges = open_judges(settings.judging)
    try:
        for judge in judges:
            await judge.prepare()
        (folder.folder / MANIFEST).unlink(missing_ok=True)
        with tracked_folder(folder, settings.run) as own_run:
            own_run.log_config(json.loads(as_json(settings)))
            own_run.log_params({f"prompt.{kind}": version for kind, version in questions.prompt_versions().items()})  # fmt: skip
            interpreted = await interpret_latents(
                settings=settings, store=store, pool=pool, latents=latents, judges=judges
            )
            content = write_explanations(settings, interpreted, judges, folder.folder)
            content |= {"contexts": str(settings.contexts), "place": settings.place, "silence_is_known": pool.silence_is_known, "seconds": round(time.monotonic() - started, 2)}  # fmt: skip
            write_report(content, folder.folder, own_run)
            failed, took = content["failed_answers"], round(time.monotonic() - started, 2)
            folder.finish(
                {"latents": len(interpreted), "failed": failed, "model": store.facts.get("model"), "seconds": took}
            )
    finally:
        # All judges are halted before the first one is closed, so that none is asked while another is waited for.
        for judge in judges:
            judge.halt(JudgeStoppedError("the run is ending"))
        for judge in judges:
            await judge.close()
    say(f"report: {folder.folder / 'report.html'}")
    return folder.folder


def _latents(settings: Interpret, store: ContextStore) -> list[int]:
    """Latents to explain, the largest |weight| x mean x density first where the head is known. Raises UserError if there are none."""
    table = store.latents.filter(pc.equal(store.latents["place"], settings.place))
    rows = {row["latent"]: row for row in table.to_pylist()}
    if settings.latents:
        return list(dict.fromkeys(settings.latents))
    if not rows:
        raise UserError(f"{settings.contexts} holds no latent at the place {settings.place}. Pass another --place, or collect contexts there.")  # fmt: skip

    def effect(row: dict[str, Any]) -> float:  # fmt: skip
        return float((1.0 if row["weight"] is None else abs(row["weight"])) * row["mean"] * row["density"])

    ranked = sorted(rows.values(), key=lambda row: (-effect(row), row["latent"]))
    return [row["latent"] for row in ranked[: settings.max_latents]]


def _pool(settings: Interpret, store: ContextStore) -> Pool:
    """Texts that tests draw from; silence is known where a folder of scored texts is there, and presumed otherwise."""
    table = store.contexts.filter(pc.equal(store.contexts["place"], settings.place))
    if settings.scored is not None:
        return Pool(scored_texts(settings.scored, table.to_pylist()), silence_is_known=True)
    path = settings.contexts / POOL_FILE
    if path.exists():
        return Pool(
            pq.read_table(path).filter(pc.equal(pc.field("place"), settings.place)).to_pylist(), silence_is_known=True
        )
    return Pool.of_contexts(table)
