"""The report of a run: one `Report`, written as report.json (for programs), report.md and report.html (for people).

Long texts keep their end: the rewarded token is the last.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sarm.contracts.manifest import write_atomically
from sarm.data.sources.shown_text import clean_text
from sarm.interpret.attribution import PairExplanation, mean_contribution
from sarm.report.citation import Citation
from sarm.report.numbers import number, seconds, share, signed, span
from sarm.report.pages import Dots
from sarm.report.render import cell, html, markdown, picture, table

TEXT_LIMIT = 300
TEXT_KEYS = frozenset({"text", "prompt", "chosen", "rejected"})
LABELS = {
    "fvu": "SAE variance unexplained (FVU)",
    "alive_at_reward": "latents alive at the reward",
    "ece": "calibration error (ECE)",
    "nll": "NLL, nats per pair",
    "peak_rss_gb": "peak memory, GB",
    "completeness": "largest |reward − Σ w·z|",
    "fvu_sentence_ends": "FVU at the ends of texts",
    "fvu_pca": "FVU of as many principal components",
    "reward_fidelity": "probe's reward kept by the SAE",
    "num_alive_at_reward": "latents that fire on held-out answers",
    "always_on_share": "contributions of always-on latents",
    "dense_share": "contributions of dense latents",
    "intercept": "intercept: what always-on latents add to every reward",
    "num_always_on": "always-on latents",
    "latents_half_margin": "latents that carry half of a margin",
    "latents_ninety_margin": "latents that carry 9/10 of a margin",
    "names_auc": "AUC of words for strong latents",
    "sarm_minus_scalar": "accuracy, SARM − scalar head",
}

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the report shows; every field but the title may be empty, and an empty one leaves its section out."""

    title: str
    """Name of the run."""
    facts: Row = field(default_factory=dict)
    """Facts of the run in reading order: model, layer, d_sae, k, number of pairs ..."""
    headline: Row = field(default_factory=dict)
    """Figures that stand at the top level of report.json: heldout_accuracy, heldout_accuracy_ci95, fvu ..."""
    accuracies: Sequence[Row] = ()
    """`{name, accuracy, ci95}`, own model first, then what it is compared with."""
    stages: Sequence[Row] = ()
    """`{stage, seconds, figures}` with the key figures as one line of text."""
    subsets: Row = field(default_factory=dict)
    """`by_subset` of `measure_pairs`: name -> measures."""
    calibration: Row = field(default_factory=dict)
    """`{nll, brier, ece}`."""
    raising: Sequence[Row] = ()
    """Features that raise the reward, see `describe_features`."""
    lowering: Sequence[Row] = ()
    """Features that lower the reward, see `describe_features`."""
    pairs: Sequence[Row] = ()
    """Explained example pairs, see `describe_pair`."""
    rejected_rows: Row = field(default_factory=dict)
    """Reason -> number of input rows that were refused."""
    figures: Mapping[str, str] = field(default_factory=dict)
    """Caption -> SVG text, see `figures.as_svg`."""
    notes: Sequence[str] = ()
    """Sentences that a reader has to know, such as what was left out."""
    citation: Citation | None = None
    """How it is cited."""
    ui_command: str = ""
    """Command that opens the experiment tracker on this run."""


class ReportFiles(NamedTuple):
    """The three files of a report."""

    json: Path
    markdown: Path
    html: Path


def write_report(report: Report, folder: Path) -> ReportFiles:
    """Write report.json, report.md and report.html into an existing folder."""
    files = ReportFiles(folder / "report.json", folder / "report.md", folder / "report.html")
    for path, text in zip(files, (to_json(report), to_markdown(report), to_html(report)), strict=True):
        write_atomically(path, text)
    return files


def as_dict(report: Report) -> dict[str, Any]:
    """The report as JSON values: headline at the top level, texts cut and cleaned, None for what is not finite.

    Figures are named only. Raises ValueError if a headline figure has the name of a section.
    """
    if taken := sorted({f.name for f in fields(Report)} & report.headline.keys()):
        raise ValueError(f"headline figures cannot be named like a section of the report, got {', '.join(taken)}")
    plain = {**asdict(report), "figures": list(report.figures)}
    if report.citation is not None:
        plain["citation"] |= {"bibtex": report.citation.entry()}
    headline = plain.pop("headline")
    content: dict[str, Any] = _clean({"title": plain.pop("title"), **headline, **plain})
    return content


def to_json(report: Report) -> str:
    """Strict JSON (no NaN) of `as_dict`."""
    return json.dumps(as_dict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_html(report: Report) -> str:
    """One self-contained page without scripts."""
    content = as_dict(report)
    return html(
        "report",
        title=content["title"],
        facts=content["facts"],
        notes=content["notes"],
        report=content,
        tiles=_tiles(report),
        dots=_dots(content["accuracies"]),
        cited=report.citation.rows() if report.citation else {},
        figures=[picture(caption, svg) for caption, svg in report.figures.items()],
    )


def to_markdown(report: Report) -> str:
    """The tables; contexts and pairs are in the page only."""
    r = as_dict(report)
    accuracies = [(row["name"], share(row["accuracy"]), _interval(row)) for row in r["accuracies"]]
    parts = _table("Held-out accuracy", ("", "accuracy", "95 % interval"), accuracies)
    parts += _table("Key figures", ("figure", "value"), list(_tiles(report).items()))
    for title, rows in (("raise", r["raising"]), ("lower", r["lowering"])):
        columns = [
            (str(row["latent"]), signed(row["mean_contribution"]), signed(row["weight"]), share(row["frequency"]))
            for row in rows
        ]
        parts += _table(
            f"Features that {title} the reward", ("latent", "mean contribution", "weight", "fires in"), columns
        )
    subsets = [
        (name, m.get("num_pairs"), share(m.get("accuracy")), _interval(m, "accuracy_ci95"), m.get("note", ""))
        for name, m in r["subsets"].items()
    ]
    parts += _table("By subset", ("subset", "pairs", "accuracy", "95 % interval", "note"), subsets)
    parts += _table("Calibration", ("measure", "value"), list(r["calibration"].items()))
    stages = [(row["stage"], seconds(row["seconds"]), row["figures"]) for row in r["stages"]]
    parts += _table("Stages", ("stage", "time", "figures"), stages)
    parts += _table("Rows refused", ("reason", "rows"), list(r["rejected_rows"].items()))
    parts += _table("Cite this report", ("", ""), list(report.citation.rows().items()) if report.citation else [])
    return markdown(r["title"], r["facts"], r["notes"], parts)


def describe_features(
    features: pa.Table, contexts: pa.Table, num_contexts: int, names: Mapping[str, Row] | None = None
) -> list[dict[str, Any]]:
    """Rows for `Report.raising` or `.lowering` from FEATURES rows (order kept) and the CONTEXTS of their latents.

    `names` are `{terms, auc}` of latents, by their numbers as text.
    """
    described = []
    for row, mean in zip(features.to_pylist(), mean_contribution(features).tolist(), strict=True):
        own = contexts.filter(pc.equal(contexts["latent"], row["latent"])).sort_by("rank").slice(0, num_contexts)
        described.append(
            {
                "latent": row["latent"],
                "weight": row["weight"],
                "mean_contribution": mean,
                "mean_margin_contribution": row["mean_margin_contribution"],
                "frequency": (row["frequency_chosen"] + row["frequency_rejected"]) / 2,
                "names": dict((names or {}).get(str(row["latent"]), {})),
                "contexts": own.select(["value", "side", "text"]).to_pylist(),
            }
        )
    return described


def describe_pair(explanation: PairExplanation, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """One row for `Report.pairs`: the explained margin and the texts of the pair."""
    return {**asdict(explanation), "prompt": prompt, "chosen": chosen, "rejected": rejected}


def _clean(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {clean_text(str(name)): _clean(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item, key) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return clean_text(str(value), TEXT_LIMIT if key in TEXT_KEYS else None)


def _tiles(report: Report) -> dict[str, str]:
    """Single headline figures; accuracies and tables have their own places."""
    return {
        LABELS.get(name, name.replace("_", " ")): number(value)
        for name, value in _clean(report.headline).items()
        if "accuracy" not in name and not isinstance(value, (dict, list))
    }


def _dots(accuracies: Sequence[Row]) -> Dots | None:
    """Accuracies on one scale that shows chance and every interval, our own model first."""
    known = [row for row in accuracies if row["accuracy"] is not None]
    if not known:
        return None
    rows = [
        {"name": row["name"], "value": row["accuracy"], "ci95": row.get("ci95"), "label": share(row["accuracy"]), "own": place == 0}
        for place, row in enumerate(known)
    ]  # fmt: skip
    ends = [end for row in known for end in (row.get("ci95") or [row["accuracy"]])]
    low = max(0.0, math.floor(20 * min([*ends, 0.5]) - 0.2) / 20)
    high = min(1.0, math.ceil(20 * max([*ends, 0.55]) + 0.2) / 20)
    return Dots(rows=rows, low=low, high=high, zero=0.5)


def _interval(row: Row, key: str = "ci95") -> str:
    return span(row[key]) if row.get(key) else ""


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    return [f"## {title}", table(columns, ([cell(value) for value in row] for row in rows))]
