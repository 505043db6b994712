"""The folder of explanations/v1: its tables, the prompts that were asked, the report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.manifest import write_atomically
from sarm.contracts.tables import EXPLANATIONS_TABLE, JUDGED_TEXTS_TABLE, RATINGS_TABLE, SHOWN_TEXTS_TABLE
from sarm.engine.llm.judge import Judge
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.terminal import say
from sarm.interpret import explaining, questions
from sarm.interpret.explaining import Explained
from sarm.interpret.labels import EXTRACTIVE
from sarm.report.judges_page import build_page, measure, metrics
from sarm.report.pages import write_page
from sarm.settings.judging import Interpret
from sarm.stages.interpret_latents import Interpreted

_PROMPTS = "prompts"
_FILES = ("explanations.parquet", "ratings.parquet", "examples.parquet", "report.json", "report.md", "report.html")


def write_explanations(
    settings: Interpret, interpreted: Sequence[Interpreted], judges: Sequence[Judge], out: Path
) -> dict[str, Any]:
    """Write the tables and the prompts; returns what the report says of them."""
    explainer = judges[0].spec.name if judges else ""
    rows = [row for latent in interpreted for row in _rows(latent, settings.place, explainer)]
    texts = [row for latent in interpreted for row in _judged_texts(latent, settings.place, explainer)]
    ratings = [{**rated.__dict__, "place": settings.place} for latent in interpreted for rated in latent.ratings]
    shown = [
        {"latent": latent.explained.samples.latent, "text": example.text, "activation": example.activation}
        for latent in interpreted
        for example in (latent.explained.samples.explain[0] if latent.explained.samples.explain else ())
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=EXPLANATIONS_TABLE), out / "explanations.parquet")
    pq.write_table(pa.Table.from_pylist(ratings, schema=RATINGS_TABLE), out / "ratings.parquet")
    pq.write_table(pa.Table.from_pylist(texts, schema=JUDGED_TEXTS_TABLE), out / "examples.parquet")
    pq.write_table(pa.Table.from_pylist(shown, schema=SHOWN_TEXTS_TABLE), out / "shown.parquet")
    (out / _PROMPTS).mkdir()
    for kind, version in questions.prompt_versions().items():
        text = f"{questions.SYSTEM}\n\n{questions.PROMPTS[kind]}\n"
        write_atomically(out / _PROMPTS / f"{kind}-{version}.txt", text)
    return measure(
        rows=rows,
        texts=texts,
        ratings=ratings,
        costs=[judge.cost() for judge in judges],
        min_coverage=settings.min_coverage,
        rubrics=settings.rubrics,
    )


def write_report(content: Mapping[str, Any], out: Path, run: StageRun) -> None:
    """Write the report beside the tables, log the folder to MLflow and say the figures."""
    write_atomically(out / "report.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))
    write_page(build_page(content), out)
    run.log_metrics(metrics(content))
    if content["judges"]:
        run.log_table(content["judges"], "judges.json")
    rows = content["explanations"]
    run.log_table([{key: row.get(key) for key in EXPLANATIONS_TABLE.names} for row in rows], "explanations.json")
    for name in _FILES:
        run.log_artifact(out / name)
    run.log_artifact(out / _PROMPTS, _PROMPTS)
    for key, value in content["figures"].items():
        if value["mean"] is not None:
            say(f"{key:<16} {value['mean']:.3f}   ({value['num']} of {value['of']} latents)")


def _rows(latent: Interpreted, place: str, explainer: str) -> list[dict[str, Any]]:
    """Rows of EXPLANATIONS of one latent: the judge's if one was asked, then the extractive label's."""
    explained, is_dead = latent.explained, latent.explained.status == "dead"
    label = Explained(explained.samples, "dead" if is_dead else "ok", latent.label, explained.reason if is_dead else "")
    own = explaining.explanation_row(
        explained=explained, place=place, explainer=explainer, scores=latent.scores, ratings=latent.ratings
    )
    extractive = explaining.explanation_row(
        explained=label, place=place, explainer=EXTRACTIVE, scores=latent.label_scores, ratings=()
    )
    return [own, extractive] if explainer else [extractive]


def _judged_texts(latent: Interpreted, place: str, explainer: str) -> list[dict[str, Any]]:
    """Rows of JUDGED_TEXTS of one latent."""
    return [
        {
            "latent": latent.explained.samples.latent,
            "place": place,
            "explainer": name,
            "score": judged.score,
            "text_id": judged.example.text_id,
            "prompt_hash": judged.example.prompt_hash,
            "kind": judged.example.kind,
            "decile": judged.example.decile,
            "activation": judged.example.activation,
            "said": judged.said,
            "status": judged.status,
        }
        for name, scores in ((explainer, latent.scores), (EXTRACTIVE, latent.label_scores))
        for judged in scores.judged
    ]
