"""`jobs/interpret.py`: contexts/v1 -> explanations, their tests and ratings -> explanations/v1, report, MLflow."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sarm.contracts.folders import CONTEXTS_FOLDER, EVALUATION_FOLDER, EXPLANATIONS_FOLDER
from sarm.contracts.manifest import MANIFEST, StageFolder, write_atomically
from sarm.contracts.tables import EXPLANATIONS_TABLE, JUDGED_TEXTS_TABLE, RATINGS_TABLE, SHOWN_TEXTS_TABLE
from sarm.engine.llm.endpoint import JudgeStoppedError
from sarm.engine.llm.judge import Judge, open_judges
from sarm.engine.mlflow.tracking import StageRun, tracking_uri
from sarm.engine.session import tracked_folder
from sarm.engine.terminal import say
from sarm.interpret import explaining, questions
from sarm.interpret.context_store import ContextStore, load_contexts
from sarm.interpret.explaining import Explained, Rated, Scores, Scoring
from sarm.interpret.labels import EXTRACTIVE, Background, label
from sarm.interpret.sampling import Pool, Samples, draw_samples
from sarm.interpret.silence import scored_texts
from sarm.report.judges_page import build_page, measure, metrics
from sarm.report.pages import write_page
from sarm.settings.checks import UserError
from sarm.settings.identity import as_json, identity
from sarm.settings.judging import Interpret

POOL_FILE = "pool.parquet"
_FILES = ("explanations.parquet", "ratings.parquet", "examples.parquet", "report.json", "report.md", "report.html")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class Found:
    """All that is known of one latent at the end."""

    explained: Explained
    label: str
    scores: Scores = field(default_factory=Scores)
    label_scores: Scores = field(default_factory=Scores)
    ratings: list[Rated] = field(default_factory=list)


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
            found = await _interpret(settings=settings, store=store, pool=pool, latents=latents, judges=judges)
            failed = _write(
                settings=settings,
                found=found,
                judges=judges,
                silence_is_known=pool.silence_is_known,
                out=folder.folder,
                seconds=time.monotonic() - started,
                run=own_run,
            )
            took = round(time.monotonic() - started, 2)
            folder.finish({"latents": len(found), "failed": failed, "model": store.facts.get("model"), "seconds": took})
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


async def _interpret(
    settings: Interpret, store: ContextStore, pool: Pool, latents: Sequence[int], judges: Sequence[Judge]
) -> list[Found]:
    background = Background(row["text"] for row in pool.rows)
    at_place = store.latents.filter(pc.equal(store.latents["place"], settings.place))
    largest = dict(zip(at_place["latent"].to_pylist(), at_place["max"].to_pylist(), strict=True))
    sizes = {name: getattr(settings, name) for name in ("num_explain", "num_test", "num_negatives", "candidates", "intruder_trials")}  # fmt: skip

    def samples_of(latent: int) -> Samples:
        rows = store.of(latent, settings.place).to_pylist()
        return draw_samples(latent, rows, largest.get(latent, 0.0), pool, **sizes)

    def label_of(samples: Samples) -> str:
        # The label is made from the explaining texts only, because it is tested on the others, as any explanation is.
        return label(background.characteristic([one.text for sample in samples.explain for one in sample]))

    if not judges:
        found = []
        for latent in latents:
            samples = samples_of(latent)
            dead = not any(samples.explain)
            found.append(Found(Explained(samples, "dead" if dead else "ok", reason=_silent(latent, largest) if dead else ""), label_of(samples)))  # fmt: skip
        return found
    scoring = Scoring(judges[0].ask, settings.texts_per_question, settings.min_coverage)

    async def explain(latent: int) -> Found:
        samples = samples_of(latent)
        explained = await explaining.explain(samples, scoring)
        if explained.status == "dead" and latent not in largest:
            explained = Explained(samples, "dead", reason=_silent(latent, largest))
        return Found(explained, label_of(samples))

    width = 2 * settings.judging.concurrency
    found = await _each(latents, explain, width, "explained")
    others = explaining.other_explanations([one.explained for one in found])

    async def test(one: Found) -> Found:
        samples = one.explained.samples
        if one.explained.status == "dead":
            return one
        rated = asyncio.gather(
            *(
                explaining.rate(
                    samples=samples,
                    rubric=rubric,
                    judge=judge.spec.name,
                    ask=judge.ask,
                    repeats=settings.repeats,
                    answer_format=settings.answer_format,
                )
                for judge in judges
                for rubric in settings.rubrics
            )
        )
        one.scores, one.label_scores, ratings = await asyncio.gather(
            explaining.score(one.explained, others.get(samples.latent), scoring),
            explaining.score_label(samples, one.label, scoring),
            rated,
        )
        one.ratings = [rating for part in ratings for rating in part]
        return one

    return await _each(found, test, width, "scored")


def _silent(latent: int, largest: dict[int, float]) -> str:
    return "too few texts to explain it from" if latent in largest else f"latent {latent} fires nowhere in these texts"


async def _each(items: Iterable[Item], work: Callable[[Item], Awaitable[Result]], width: int, done: str) -> list[Result]:  # fmt: skip
    """`work` of every item, `width` at a time, in order; the first error ends all."""
    queue = list(enumerate(items))[::-1]
    results: dict[int, Result] = {}
    total, said = len(queue), time.monotonic()

    async def worker() -> None:
        nonlocal said
        while queue:
            place, item = queue.pop()
            results[place] = await work(item)
            if time.monotonic() - said > 20:
                said = time.monotonic()
                say(f"{len(results):,} of {total:,} latents {done}")

    workers = [asyncio.create_task(worker()) for _ in range(min(width, total))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
    return [results[place] for place in range(total)]


def _write(
    settings: Interpret, found: Sequence[Found], judges: Sequence[Judge], silence_is_known: bool, out: Path, seconds: float, run: StageRun
) -> int:  # fmt: skip
    """Tables, report and MLflow; returns how many answers failed."""
    explainer = judges[0].spec.name if judges else ""
    rows, texts, ratings = [], [], []
    for one in found:
        if judges:
            rows.append(
                explaining.explanation_row(
                    explained=one.explained,
                    place=settings.place,
                    explainer=explainer,
                    scores=one.scores,
                    ratings=one.ratings,
                )
            )
        label = Explained(one.explained.samples, "dead" if one.explained.status == "dead" else "ok", one.label, one.explained.reason if one.explained.status == "dead" else "")  # fmt: skip
        rows.append(
            explaining.explanation_row(
                explained=label, place=settings.place, explainer=EXTRACTIVE, scores=one.label_scores, ratings=()
            )
        )
        ratings += [{**rated.__dict__, "place": settings.place} for rated in one.ratings]
        for name, scores in ((explainer, one.scores), (EXTRACTIVE, one.label_scores)):
            texts += [
                {"latent": one.explained.samples.latent, "place": settings.place, "explainer": name, "score": j.score, "text_id": j.example.text_id,
                 "prompt_hash": j.example.prompt_hash, "kind": j.example.kind, "decile": j.example.decile, "activation": j.example.activation, "said": j.said, "status": j.status}
                for j in scores.judged
            ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=EXPLANATIONS_TABLE), out / "explanations.parquet")
    pq.write_table(pa.Table.from_pylist(ratings, schema=RATINGS_TABLE), out / "ratings.parquet")
    pq.write_table(pa.Table.from_pylist(texts, schema=JUDGED_TEXTS_TABLE), out / "examples.parquet")
    shown = [
        {"latent": one.explained.samples.latent, "text": example.text, "activation": example.activation}
        for one in found
        for example in (one.explained.samples.explain[0] if one.explained.samples.explain else ())
    ]
    pq.write_table(pa.Table.from_pylist(shown, schema=SHOWN_TEXTS_TABLE), out / "shown.parquet")
    prompts = out / "prompts"
    prompts.mkdir()
    for kind, version in questions.prompt_versions().items():
        write_atomically(prompts / f"{kind}-{version}.txt", f"{questions.SYSTEM}\n\n{questions.PROMPTS[kind]}\n")
    costs = [judge.cost() for judge in judges]
    content = measure(
        rows=rows,
        texts=texts,
        ratings=ratings,
        costs=costs,
        min_coverage=settings.min_coverage,
        rubrics=settings.rubrics,
    )
    content |= {"contexts": str(settings.contexts), "place": settings.place, "silence_is_known": silence_is_known, "seconds": round(seconds, 2)}  # fmt: skip
    write_atomically(out / "report.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    write_page(build_page(content), out)
    run.log_metrics(metrics(content))
    if costs:
        run.log_table(costs, "judges.json")
    run.log_table([{key: row.get(key) for key in EXPLANATIONS_TABLE.names} for row in rows], "explanations.json")
    for name in _FILES:
        run.log_artifact(out / name)
    run.log_artifact(prompts, "prompts")
    for key, value in content["figures"].items():
        if value["mean"] is not None:
            say(f"{key:<16} {value['mean']:.3f}   ({value['num']} of {value['of']} latents)")
    failed: int = content["failed_answers"]
    return failed
