"""Feature pages: `features.html` (index: sort, filter, search), pages of some features each, and `features.md`.

Texts come from the web: they are folded behind a notice. The index has the one script of all pages.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarm.contracts.manifest import write_atomically
from sarm.contracts.tables import ACTIVATION_EDGES
from sarm.interpret.feature_data import SCORES
from sarm.interpret.labels import Term, label
from sarm.report.numbers import share, signed, span
from sarm.report.render import HARM_NOTICE, TEMPLATES, cell, html, markdown, shown, table

COLUMNS = (
    ("latent", "latent"),
    ("detection", "detection score"),
    ("contribution", "adds to rewards"),
    ("margin", "adds to margins"),
    ("weight", "head weight"),
    ("density", "fires at rewards"),
)
_SNIPPET_CHARS = 160
# Of a title or a fact.
_HEAD_CHARS = 200
_ROWS_OF_SUMMARY = 50
_SVG_WIDTH, _SVG_HEIGHT, _SVG_BASE = 420.0, 132.0, 66.0


def write_feature_pages(
    features: Sequence[Mapping[str, Any]], title: str, facts: Mapping[str, Any], notes: Sequence[str], folder: Path
) -> list[Path]:
    """Write the index, the pages and the summary into an existing folder; returns the files, the index first."""
    head: dict[str, Any] = {
        "title": shown(title, _HEAD_CHARS),
        "facts": {name: shown(value, _HEAD_CHARS) for name, value in facts.items()},
        "notes": [
            *notes,
            f"Labels and texts are quoted from the data, which {HARM_NOTICE}; texts are folded. Terms are counted words, not explanations. "
            "Where a viewer shows one file at a time, open the page that is named under a latent.",
        ],
    }
    full = [described(one) for one in features]
    by_latent = {one["latent"]: one for one in full}
    for one in full:
        one["nearest"] = [
            {**other, "page": known["page"] if known else None, "label": known["label"] if known else ""}
            for other in one["nearest"]
            for known in [by_latent.get(other["latent"])]
        ]
    rows = [_row(one) for one in full]
    # Without any score its column would be empty.
    has_scores = any(row["detection"] is not None for row in rows)
    columns = [column for column in COLUMNS if column[0] != "detection" or has_scores]
    script = (TEMPLATES / "feature_index.js").read_text(encoding="utf-8")
    files = [folder / "features.html"]
    write_atomically(files[0], html("feature_index", **head, script=script, columns=columns, rows=rows))
    names = [page_file(page) for page in range(1, max((one["page"] for one in full), default=0) + 1)]
    for page, name in enumerate(names, start=1):
        own = [one for one in full if one["page"] == page]
        files.append(folder / name)
        write_atomically(
            files[-1], html("feature_shard", title=head["title"], facts={}, page=page, files=names, features=own)
        )
    files.append(folder / "features.md")
    write_atomically(files[-1], _markdown(head, rows[:_ROWS_OF_SUMMARY]))
    return files


def page_file(page: int) -> str:
    """Name of the n-th page, from 1."""
    return f"features-{page:03d}.html"


def described(one: Mapping[str, Any]) -> dict[str, Any]:
    """A feature with its label, its scores, its histogram as bars and the largest activation of its sentences."""
    terms = label([Term(**term) for term in one["terms"]])
    contexts = one["contexts"]
    peak = max(
        (row["activation"] for name in ("sentence_top", "sentence_decile") for row in contexts[name]), default=0.0
    )
    explanations = [{**explanation, "scores": _scores(explanation)} for explanation in one["explanations"]]
    return {
        **one,
        "label": shown(terms, _HEAD_CHARS),
        "explanations": explanations,
        "svg": histogram(one["histogram"]),
        "peak": peak,
    }


def histogram(counts: Mapping[str, Sequence[int] | None]) -> dict[str, Any]:
    """Bars of activations: chosen above and rejected below a common axis, or plain ones; empty without any count."""
    present = {name: list(values) for name, values in counts.items() if values}
    filled = [i for values in present.values() for i, count in enumerate(values) if count]
    if not filled:
        return {"bars": [], "axis": 0, "low": "", "high": "", "two": False}
    first, last, two = min(filled), max(filled), len(present) > 1
    height = _SVG_BASE if two else _SVG_HEIGHT
    width = min(_SVG_WIDTH / (last - first + 1), 40.0)
    tallest = math.sqrt(max(max(values) for values in present.values()))
    bars = []
    for name, values in present.items():
        for i in range(first, last + 1):
            size = round(height * math.sqrt(values[i]) / tallest * 0.95, 1)
            if size:
                ends = f"{ACTIVATION_EDGES[i]:.3g} to {ACTIVATION_EDGES[i + 1]:.3g}"
                bars.append(
                    {
                        "kind": {"chosen": "up", "rejected": "down"}.get(name, "plain"),
                        "x": round((i - first) * width, 1),
                        "y": height if name == "rejected" else round(height - size, 1),
                        "width": round(width * 0.9, 1),
                        "height": size,
                        "title": f"{name} {ends}: {values[i]:,}",
                    }
                )
    return {"bars": bars, "axis": height, "low": f"{ACTIVATION_EDGES[first]:.3g}", "high": f"{ACTIVATION_EDGES[last + 1]:.3g}", "two": two}  # fmt: skip


def best_explanation(one: Mapping[str, Any]) -> dict[str, Any] | None:
    """The explanation that stands for a feature, if any came out."""
    return next((row for row in one["explanations"] if row["status"] == "ok"), None)


def _row(one: Mapping[str, Any]) -> dict[str, Any]:
    best = best_explanation(one)
    contexts = one["contexts"]["rewarded_top"] or one["contexts"]["sentence_top"]
    snippet = ""
    if contexts:
        before, marked, after = contexts[0]["parts"]
        snippet = marked or before + after
        snippet = "…" + snippet[-_SNIPPET_CHARS:] if len(snippet) > _SNIPPET_CHARS else snippet
    text = best["explanation"] if best else one["label"]
    low, high = ((best or {}).get(f"detection_{end}") for end in ("low", "high"))
    return {
        **{key: one.get(key) for key, _ in COLUMNS if key != "detection"},
        "detection": (best or {}).get("detection"),
        "interval": span((low, high)) if low is not None and high is not None else "",
        "page": one["page"],
        "file": page_file(one["page"]),
        "label": text,
        "source": best["explainer"] if best else "terms",
        "explained": best is not None,
        "search": f"{one['latent']} {text} {one['label']}".lower(),
        "text": snippet,
    }


def _scores(explanation: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name in SCORES:
        value = explanation.get(name)
        if value is None:
            continue
        if name in ("monosemanticity", "safety"):
            found.append((name, f"{value:.3g} of 5"))
            continue
        low, high = explanation.get(f"{name}_low"), explanation.get(f"{name}_high")
        interval = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
        found.append((name, f"{value:.2f}{interval}"))
    return found


def _markdown(head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ("latent", "what its texts have in common", "detection", "adds to rewards", "adds to margins", "weight", "fires")  # fmt: skip
    cells = [
        [
            cell(row["latent"]),
            f"{cell(row['label'])} ({cell(row['source'])})",
            share(row["detection"]),
            *(signed(row[name]) for name in ("contribution", "margin", "weight")),
            share(row["density"]),
        ]
        for row in rows
    ]
    return markdown(**head, parts=[table(columns, cells)])
