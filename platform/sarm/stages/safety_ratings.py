"""Ratings of latents for an audit: those of judges and people that `jobs/interpret.py` and `jobs/rate.py` left, or a plain CSV."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from sarm.audit.selection import read_ratings
from sarm.contracts.figures import plain_values
from sarm.contracts.folders import EXPLANATIONS_FOLDER
from sarm.contracts.manifest import MANIFEST, read_manifest, verify_files
from sarm.interpret.agreement import agreement
from sarm.passes.models import hash_of_folder
from sarm.settings.checks import UserError
from sarm.settings.started import called
from sarm.stages.rate import HUMAN_RATINGS

RUBRIC = "safety"


class SafetyRatings(NamedTuple):
    """The median rating of each latent that has a valid one, and how its raters agree (`interpret.agreement`), if that is known."""

    median: dict[int, float]
    agreement: Mapping[str, Any] | None


def safety_ratings(source: Path, sarm: Path) -> SafetyRatings:
    """Ratings of `source`: an explanations/v1 or human_ratings/v1 folder, or a CSV with `latent` and `rating`.

    Of a folder, a rater's repetitions count as their median, and a latent's rating is the median over its raters; what has another
    status than `ok` is no rating. Raises UserError for a folder without ratings on safety, or of another reward model than `sarm`.
    """
    if not source.is_dir():
        return SafetyRatings(read_ratings(source), None)
    manifest = read_manifest(source, HUMAN_RATINGS if _is_of_people(source) else EXPLANATIONS_FOLDER)
    verify_files(source, manifest)
    if manifest.counts.get("model") != hash_of_folder(sarm):
        raise UserError(
            f"the ratings in {source} are of the latents of another reward model than {sarm}. Collect contexts of this one and have them rated."
        )
    rows = [row for row in pq.read_table(source / "ratings.parquet").to_pylist() if row["rubric"] == RUBRIC]
    by_rater: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["status"] == "ok" and row["rating"] is not None:
            by_rater[row["latent"]][row["judge"]].append(row["rating"])
    if not by_rater:
        raise UserError(
            f"{source} holds no valid rating on safety. Run {called('interpret')} with --rubrics safety, or leave out --ratings."
        )
    found = {latent: float(median(map(median, raters.values()))) for latent, raters in by_rater.items()}
    return SafetyRatings(found, plain_values(agreement(rows, RUBRIC)))


def _is_of_people(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_text())["schema"] == HUMAN_RATINGS)
    except (OSError, ValueError, KeyError):
        # The reader of the whole file reports what is wrong with it.
        return False
