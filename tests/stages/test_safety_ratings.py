"""Ratings for an audit from folders of judges and of people: whose count, whose do not, and of which model."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sarm.contracts.folders import EXPLANATIONS_FOLDER
from sarm.contracts.manifest import StageFolder
from sarm.contracts.tables import RATINGS_TABLE
from sarm.passes.models import hash_of_folder
from sarm.settings.checks import UserError
from sarm.stages.rate import HUMAN_RATINGS
from sarm.stages.safety_ratings import safety_ratings


@pytest.fixture
def sarm(tmp_path) -> Path:
    folder = tmp_path / "sarm"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def rated(latent: int, rating: int | None, judge: str = "a", repeat: int = 0, **other: str) -> dict:
    status = "ok" if rating is not None else "refused"
    row = {"latent": latent, "place": "rewarded", "rubric": "safety", "judge": judge, "repeat": repeat}
    return {**row, "rating": rating, "status": status, "reason": "", **other}


def folder_of(tmp_path: Path, rows: list[dict], model: str | None, kind: str = EXPLANATIONS_FOLDER) -> Path:
    stage = StageFolder(tmp_path / "ratings", kind, {}, {})
    stage.claim()
    pq.write_table(pa.Table.from_pylist(rows, schema=RATINGS_TABLE), stage.folder / "ratings.parquet")
    stage.finish({"model": model})
    return stage.folder


@pytest.mark.parametrize("kind", [EXPLANATIONS_FOLDER, HUMAN_RATINGS])
def test_a_latents_rating_is_the_median_over_raters_of_each_ones_median(tmp_path, sarm, kind):
    rows = [
        *(rated(1, rating, "a", repeat) for repeat, rating in enumerate((1, 5, 5))),
        rated(1, 3, "b"),
        rated(2, 5, "a"),
        rated(2, None, "b"),
        rated(3, None, "a"),
        rated(4, 5, "a", status="api_error"),
        rated(5, 5, "a", rubric="monosemanticity"),
    ]
    found = safety_ratings(folder_of(tmp_path, rows, hash_of_folder(sarm), kind), sarm)
    assert found.median == {1: 4.0, 2: 5.0}, "three answers of one judge are one voice; failures are none"
    assert found.agreement is not None
    assert set(found.agreement["answered"]) == {"a", "b"}


def test_ratings_of_another_model_are_refused(tmp_path, sarm):
    with pytest.raises(UserError, match="of another reward model"):
        safety_ratings(folder_of(tmp_path, [rated(1, 5)], "other"), sarm)


def test_a_folder_without_a_rating_on_safety_is_refused(tmp_path, sarm):
    rows = [rated(1, None), rated(1, 5, rubric="monosemanticity")]
    with pytest.raises(UserError, match="no valid rating on safety"):
        safety_ratings(folder_of(tmp_path, rows, hash_of_folder(sarm)), sarm)


def test_a_folder_of_something_else_or_a_torn_one_is_refused(tmp_path, sarm):
    with pytest.raises(UserError, match="manifest"):
        safety_ratings(sarm, sarm)
    folder = folder_of(tmp_path, [rated(1, 5)], hash_of_folder(sarm))
    (folder / "ratings.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"ratings\.parquet"):
        safety_ratings(folder, sarm)


def test_a_csv_is_read_as_before(tmp_path, sarm):
    path = tmp_path / "ratings.csv"
    path.write_text("latent,rating\n7,5\n")
    assert safety_ratings(path, sarm) == ({7: 5.0}, None)
