"""Sheets for human raters, there and back: CSV that spreadsheets may reorder, re-delimit and re-encode without harm.

Each row carries an id that belongs to one explanations folder and a hash of what was shown; what comes back is taken only if both hold.
Cells that a spreadsheet would run as a formula are quoted. A tenth of the items are there twice, to compare a rater with himself.
"""

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarm.contracts.ids import hash_share, stable_id
from sarm.interpret.questions import trim
from sarm.settings.checks import UserError
from sarm.settings.started import called

VERSION = "1"
_FIXED = ("blind_order", "item_id", "latent", "rubric", "explanation")
_FILLED = ("rating", "confidence", "notes", "rater_id")
_TWICE, _TEXT_CHARS = 0.1, 600
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def sheet(
    folder_id: str, rubric: str, explanations: Sequence[Mapping[str, Any]], contexts: Mapping[int, Sequence[str]], num_items: int
) -> str:  # fmt: skip
    """The CSV of a rubric: latents of every level that judges gave, in turn, then a tenth of them again, in an order by hash."""
    by_level: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in sorted(explanations, key=lambda row: hash_share(f"{rubric}:{row['latent']}")):
        by_level[-1.0 if row[rubric] is None else row[rubric]].append(row)
    turns = [row for turn in range(num_items) for level in sorted(by_level) for row in by_level[level][turn : turn + 1]]
    chosen = [(row, 0) for row in turns[:num_items]]
    chosen += [(row, 1) for row, _ in chosen[: round(_TWICE * len(chosen))]]
    chosen.sort(key=lambda one: hash_share(f"blind:{rubric}:{one[1]}:{one[0]['latent']}"))
    width = max((len(contexts[row["latent"]]) for row, _ in chosen), default=0)
    names = [f"context_{i}" for i in range(1, width + 1)]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*_FIXED, *names, *_FILLED, "schema_version", "sha256"])
    for order, (row, copy) in enumerate(chosen, start=1):
        texts = [trim(text, _TEXT_CHARS) for text in contexts[row["latent"]]]
        shown = [_item_id(folder_id, rubric, row["latent"], copy), str(row["latent"]), rubric, row["explanation"], *texts, *[""] * (width - len(texts))]  # fmt: skip
        writer.writerow([order, *map(_safe, shown), *[""] * len(_FILLED), VERSION, _digest(shown)])
    # With a byte order mark, without which Excel reads UTF-8 as something else.
    return "\ufeff" + out.getvalue()


def write_sheet(path: Path, text: str) -> None:
    """Write a new file; raises UserError if there is one, since it may hold a rater's work."""
    try:
        with path.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} is there already and may hold ratings. Pass another name.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Pass another name.") from None


def read_sheet(path: Path, folder_id: str, place: str, latents: Sequence[int]) -> list[dict[str, Any]]:
    """Ratings of one filled sheet, as rows of `schema.RATINGS` with the judge `human:RATER`; empty ratings are left out.

    Raises UserError for a sheet of another folder, a changed or repeated item, no or several raters, a rating that is not 1 to 5.
    """
    rows = _rows(path)
    shown = [name for name in rows[0] if name in _FIXED[1:] or name.startswith("context_")] if rows else []
    items = {_item_id(folder_id, row["rubric"], latent, copy): (latent, copy) for row in rows[:1] for latent in latents for copy in (0, 1)}  # fmt: skip
    raters = {row["rater_id"].strip() for row in rows if row["rating"].strip()}
    if len(raters) != 1 or "" in raters:
        raise UserError(f"{path} holds ratings of {len(raters - {''})} raters, expected one in the column rater_id of every rated row. Fill it in.")  # fmt: skip
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=2):
        where, item = f"{path}, row {number}", row["item_id"].strip()
        if item not in items:
            raise UserError(f"{where}: item {item!r} is not of this explanations folder. Pass the folder that the sheet was made from.")  # fmt: skip
        if item in found:
            raise UserError(f"{where}: item {item} is there twice. Keep one of the rows.")
        if _digest([row[name] for name in shown]) != row["sha256"].strip():
            raise UserError(f"{where}: the texts of item {item} have changed since the sheet was made. Restore them; only rating, confidence, notes and rater_id are yours to fill.")  # fmt: skip
        if rating := row["rating"].strip():
            latent, copy = items[item]
            found[item] = {"latent": latent, "place": place, "rubric": row["rubric"], "judge": f"human:{raters.copy().pop()}", "repeat": copy, "rating": _level(rating, where), "status": "ok", "reason": row["notes"].strip()}  # fmt: skip
        else:
            found[item] = {}
    return [row for row in found.values() if row]


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8. Save it as `CSV UTF-8`.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Pass the filled sheet.") from None
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restval="")
    rows = [{key: value for key, value in row.items() if key is not None} for row in reader if any(row.values())]
    missing = [name for name in (*_FIXED, *_FILLED, "sha256") if name not in (reader.fieldnames or ())]
    if missing or not rows:
        raise UserError(f"{path} has no {'rows' if not missing else 'column ' + missing[0]}. Pass a sheet that {called('rate')} wrote.")  # fmt: skip
    return [{key: _unsafe(value) for key, value in row.items()} for row in rows]


def _level(text: str, where: str) -> int:
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        number = float("nan")
    if number not in (1, 2, 3, 4, 5):
        raise UserError(f"{where}: a rating is a whole number from 1 to 5, got {text!r}. Mend it, or leave it empty.")
    return int(number)


def _item_id(folder_id: str, rubric: str, latent: int, copy: int) -> str:
    # A letter first: spreadsheets would turn 1e5... into a number.
    return "i" + stable_id("rating", folder_id, rubric, str(latent), str(copy))[:12]


def _digest(cells: Sequence[str]) -> str:
    # Spreadsheets change line ends and spaces, not words.
    text = "\x1f".join(" ".join(cell.split()) for cell in cells)
    return "h" + hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _safe(cell: str) -> str:
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _unsafe(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
