"""`jobs/rate.py`: explanations/v1 -> a sheet for people; filled sheets -> ratings beside the judges', and their agreement."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sarm.contracts.figures import plain_values
from sarm.contracts.folders import EXPLANATIONS_FOLDER
from sarm.contracts.manifest import MANIFEST, StageFolder, read_manifest, sha256_of, verify_files, write_atomically
from sarm.contracts.tables import RATINGS_TABLE
from sarm.engine.mlflow.tracking import tracking_uri
from sarm.engine.session import tracked_folder
from sarm.engine.terminal import say
from sarm.interpret.agreement import agreement
from sarm.interpret.labels import EXTRACTIVE
from sarm.interpret.rater_csv import read_sheet, sheet, write_sheet
from sarm.report.judges_page import agreement_section
from sarm.report.pages import Page, write_page
from sarm.settings.checks import UserError
from sarm.settings.judging import HumanRatings

HUMAN_RATINGS = "human_ratings/v1"


def run_ratings(settings: HumanRatings) -> Path:
    """Write the sheet, or the comparison; returns the file or folder.

    Raises UserError for an unfinished explanations folder, a sheet that is there already, or one that does not belong to the folder.
    """
    manifest = read_manifest(settings.explanations, EXPLANATIONS_FOLDER)
    verify_files(settings.explanations, manifest)
    rows = pq.read_table(settings.explanations / "explanations.parquet").to_pylist()
    alive = [row for row in rows if row["status"] == "ok"]
    judged = [row for row in alive if row["explainer"] != EXTRACTIVE] or alive
    if not judged:
        raise UserError(f"{settings.explanations} explains no latent. Pass a folder that does.")
    folder_id = sha256_of(settings.explanations / MANIFEST)
    if settings.sheet is not None:
        texts = _texts(settings.explanations)
        with_texts = [row for row in judged if texts.get(row["latent"])]
        write_sheet(
            settings.sheet,
            sheet(
                folder_id=folder_id,
                rubric=settings.rubric,
                explanations=with_texts,
                contexts=texts,
                num_items=settings.num_items,
            ),
        )
        say(f"sheet: {settings.sheet}")
        return settings.sheet
    return _compare(settings, folder_id, manifest.counts.get("model"), judged)


def _compare(settings: HumanRatings, folder_id: str, model: str | None, judged: list[dict[str, Any]]) -> Path:
    tracking_uri(settings.run)
    latents, place = [row["latent"] for row in judged], judged[0]["place"]
    sheets = [read_sheet(path, folder_id, place, latents) for path in settings.filled]
    raters = [part[0]["judge"] for part in sheets if part]
    if repeated := [name for name in raters if raters.count(name) > 1]:
        raise UserError(f"two sheets are of {repeated[0].removeprefix('human:')}. Pass one sheet a rater.")
    human = [row for part in sheets for row in part]
    identity = {"sheets": sorted(sha256_of(path) for path in settings.filled)}
    folder = StageFolder(settings.run.out, HUMAN_RATINGS, identity, {EXPLANATIONS_FOLDER: (settings.explanations, EXPLANATIONS_FOLDER)})  # fmt: skip
    if folder.finished():
        say(f"already done, {folder.folder}")
        return folder.folder
    known = pq.read_table(settings.explanations / "ratings.parquet").to_pylist()
    rubrics = sorted({row["rubric"] for row in human})
    rated = {row["latent"] for row in human}
    own = [row for row in known if row["latent"] in rated]
    content = {
        "people": {rubric: plain_values(agreement(human, rubric)) for rubric in rubrics},
        "people_and_judges": {rubric: plain_values(agreement([*human, *own], rubric)) for rubric in rubrics},
    }
    with tracked_folder(folder, settings.run) as own_run:
        pq.write_table(pa.Table.from_pylist([*human, *own], schema=RATINGS_TABLE), folder.folder / "ratings.parquet")
        write_atomically(folder.folder / "report.json", json.dumps(content, indent=2, allow_nan=False))
        sections = [agreement_section(f"{name.replace('_', ' ')}: {rubric}", one) for name, of in content.items() for rubric, one in of.items()]  # fmt: skip
        note = "What people agree on among themselves is the most that a judge can be asked to agree with them."
        facts = {"explanations": settings.explanations, "raters": len(raters), "latents rated": len(rated)}
        write_page(Page(title="Ratings by people", facts=facts, notes=[note], sections=sections), folder.folder)
        own_run.log_metrics({f"{name}/{figure}_{rubric}": one["between"][figure] for name, of in content.items() for rubric, one in of.items() for figure in ("alpha", "ac2")})  # fmt: skip
        for name in ("ratings.parquet", "report.json", "report.md", "report.html"):
            own_run.log_artifact(folder.folder / name)
        folder.finish({"ratings": len(human), "raters": len(raters), "model": model})
    say(f"report: {folder.folder / 'report.html'}")
    return folder.folder


def _texts(explanations: Path) -> dict[int, list[str]]:
    """Texts that each latent was explained from, as far as a sheet shows them."""
    shown: dict[int, list[str]] = {}
    for row in pq.read_table(explanations / "shown.parquet").to_pylist():
        shown.setdefault(row["latent"], []).append(row["text"])
    return {latent: texts[:8] for latent, texts in shown.items()}
