"""Sheets for human raters survive a spreadsheet, and what does not belong to them is refused."""

import csv
import io
from pathlib import Path

import pytest

from sarm.interpret.rater_csv import read_sheet, sheet, write_sheet
from sarm.settings.checks import UserError

LATENTS = list(range(20))
ROWS = [{"latent": i, "explanation": f"=HYPERLINK({i})" if i == 3 else f"hypothesis {i}", "safety": i % 5 + 1.0} for i in LATENTS]  # fmt: skip
CONTEXTS = {i: [f"first\ntext; of, {i}", '+1 "quoted"'] for i in LATENTS}


def fill(text: str, ratings: dict[int, str], rater: str = "ada") -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))
    for row in rows:
        row["rating"] = ratings.get(int(row["latent"]), "3")
        row["rater_id"] = rater
    return rows


def save(path: Path, rows: list[dict[str, str]], delimiter: str = ",", encoding: str = "utf-8-sig") -> Path:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(out.getvalue().encode(encoding))
    return path


@pytest.fixture
def text() -> str:
    return sheet("folder", "safety", ROWS, CONTEXTS, 20)


def test_a_sheet_comes_back_as_ratings_with_a_tenth_rated_twice(text, tmp_path):
    read = read_sheet(save(tmp_path / "a.csv", fill(text, {0: "5"})), "folder", "rewarded", LATENTS)
    assert len(read) == 22
    assert sorted(row["latent"] for row in read if row["repeat"] == 0) == LATENTS
    assert {row["rating"] for row in read if row["latent"] == 0} == {5}
    assert {row["judge"] for row in read} == {"human:ada"}


def test_what_spreadsheets_do_changes_nothing(text, tmp_path):
    rows = fill(text, {1: "4,0", 2: " 2 ", 4: ""})[::-1]
    for row in rows:
        row["context_1"] = row["context_1"].replace("\n", "\r\n")
    read = read_sheet(save(tmp_path / "a.csv", rows, delimiter=";"), "folder", "rewarded", LATENTS)
    ratings = {row["latent"]: row["rating"] for row in read if row["repeat"] == 0}
    assert (ratings[1], ratings[2]) == (4, 2)
    assert 4 not in ratings


def test_no_cell_is_a_formula_and_no_score_of_a_judge_is_shown(text):
    rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]
    assert "safety_score" not in rows[0]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, 23))


def test_a_small_sheet_has_every_level_of_the_judges():
    rows = list(csv.DictReader(io.StringIO(sheet("folder", "safety", ROWS, CONTEXTS, 5).removeprefix("\ufeff"))))
    assert {int(row["latent"]) % 5 for row in rows} == {0, 1, 2, 3, 4}


def test_a_sheet_is_never_overwritten(text, tmp_path):
    write_sheet(tmp_path / "a.csv", text)
    with pytest.raises(UserError, match="may hold ratings"):
        write_sheet(tmp_path / "a.csv", text)
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == text.replace("\r\n", "\n")


def changed(field: str, value: str):
    def change(rows: list[dict[str, str]]) -> None:
        rows[2][field] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("rating", "6"), "from 1 to 5"),
        (changed("rating", "good"), "from 1 to 5"),
        (changed("rating", "3.5"), "from 1 to 5"),
        (changed("context_1", "another text"), "have changed"),
        (changed("latent", "7"), "have changed"),
        (changed("item_id", "i000000000000"), "not of this"),
        (changed("rater_id", "bob"), "2 raters"),
        (changed("rater_id", ""), "1 raters"),
        (lambda rows: rows.append(rows[0]), "there twice"),
        (lambda rows: [row.pop("rating") for row in rows], "column rating"),
    ],
)
def test_what_does_not_belong_is_refused_with_its_row(change, words, text, tmp_path):
    rows = fill(text, {})
    change(rows)
    with pytest.raises(UserError, match=words):
        read_sheet(save(tmp_path / "a.csv", rows), "folder", "rewarded", LATENTS)


def test_another_folders_sheet_another_encoding_and_no_sheet_are_refused(text, tmp_path):
    path = save(tmp_path / "a.csv", fill(text, {}))
    with pytest.raises(UserError, match="not of this"):
        read_sheet(path, "another", "rewarded", LATENTS)
    rows = fill(text, {})
    rows[0]["notes"] = "é"
    with pytest.raises(UserError, match="UTF-8"):
        read_sheet(save(tmp_path / "b.csv", rows, encoding="latin-1"), "folder", "rewarded", LATENTS)
    with pytest.raises(UserError, match="cannot be read"):
        read_sheet(tmp_path / "none.csv", "folder", "rewarded", LATENTS)
