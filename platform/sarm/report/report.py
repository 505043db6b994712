"""The report of a run: one `Report`, written as report.json (for programs), report.md and report.html (for people).

Texts and names come from data, so they are hostile until shown otherwise: control characters and direction overrides go,
long texts keep their end (the rewarded token is the last), HTML is escaped by the template engine, Markdown by `escape_markdown`.
The page is one file that asks the network for nothing, as artifact viewers show it inside a sandbox.
"""

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sarm.contracts.manifest import write_atomically
from sarm.data.sources.shown_text import clean_text, escape_markdown
from sarm.interpret.attribution import PairExplanation, mean_contribution

TEXT_LIMIT = 300
TEXT_KEYS = frozenset({"text", "prompt", "chosen", "rejected"})
HARM_NOTICE = "may contain harmful text"
LABELS = {
    "fvu": "SAE variance unexplained (FVU)",
    "alive_at_reward": "latents alive at the reward",
    "ece": "calibration error (ECE)",
    "nll": "NLL, nats per pair",
    "peak_rss_gb": "peak memory, GB",
    "completeness": "largest |reward − Σ w·z|",
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
    headline = plain.pop("headline")
    return _clean({"title": plain.pop("title"), **headline, **plain})


def to_json(report: Report) -> str:
    """Strict JSON (no NaN) of `as_dict`."""
    return json.dumps(as_dict(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def escaping_templates(folder: Path) -> Environment:
    """The templates of a folder, for pages that hold texts from the web."""
    return Environment(
        loader=FileSystemLoader(folder),
        # By default Jinja2 escapes nothing.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def to_html(report: Report) -> str:
    """One self-contained page without scripts."""
    environment = escaping_templates(Path(__file__).parent)
    environment.filters.update(number=number, percent=percent, signed=signed, seconds=seconds)
    content = as_dict(report)
    return environment.get_template("report.html.j2").render(
        report=content,
        tiles=_tiles(report),
        dots=_dots(content["accuracies"]),
        figures=[_figure(caption, svg) for caption, svg in report.figures.items()],
        harm_notice=HARM_NOTICE,
    )


def to_markdown(report: Report) -> str:
    """Tables for viewers that render Markdown, and for pull requests; contexts and pairs are in the page only."""
    r = as_dict(report)
    facts = " · ".join(f"{escape_markdown(str(name))} {_cell(value)}" for name, value in r["facts"].items())
    parts = [f"# {escape_markdown(r['title'])}", facts]
    parts += [f"> {escape_markdown(note)}" for note in r["notes"]]
    accuracies = [(row["name"], percent(row["accuracy"]), _interval(row)) for row in r["accuracies"]]
    parts += _table("Held-out accuracy", ("", "accuracy", "95 % interval"), accuracies)
    parts += _table("Key figures", ("figure", "value"), list(_tiles(report).items()))
    for title, rows in (("raise", r["raising"]), ("lower", r["lowering"])):
        columns = [
            (str(row["latent"]), signed(row["mean_contribution"]), signed(row["weight"]), percent(row["frequency"]))
            for row in rows
        ]
        parts += _table(
            f"Features that {title} the reward", ("latent", "mean contribution", "weight", "fires in"), columns
        )
    subsets = [
        (name, m.get("num_pairs"), percent(m.get("accuracy")), _interval(m, "accuracy_ci95"), m.get("note", ""))
        for name, m in r["subsets"].items()
    ]
    parts += _table("By subset", ("subset", "pairs", "accuracy", "95 % interval", "note"), subsets)
    parts += _table("Calibration", ("measure", "value"), list(r["calibration"].items()))
    stages = [(row["stage"], seconds(row["seconds"]), row["figures"]) for row in r["stages"]]
    parts += _table("Stages", ("stage", "time", "figures"), stages)
    parts += _table("Rows refused", ("reason", "rows"), list(r["rejected_rows"].items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def describe_features(features: pa.Table, contexts: pa.Table, num_contexts: int) -> list[dict[str, Any]]:
    """Rows for `Report.raising` or `.lowering` from FEATURES rows (order kept) and the CONTEXTS of their latents."""
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
                "contexts": own.select(["value", "side", "text"]).to_pylist(),
            }
        )
    return described


def describe_pair(explanation: PairExplanation, prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    """One row for `Report.pairs`: the explained margin and the texts of the pair."""
    return {**asdict(explanation), "prompt": prompt, "chosen": chosen, "rejected": rejected}


def number(value: Any) -> str:
    """A count with thousands separators, a real number with four significant digits, `n/a` for None."""
    if value is None:
        return "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) or abs(value) >= 10_000 else f"{value:.4g}"


def percent(value: float | int | None) -> str:
    """A share as a percentage with one decimal."""
    return "n/a" if value is None else f"{100 * value:.1f} %"


def signed(value: float | int | None) -> str:
    """A number with its sign and three significant digits; a true minus, which lines up with the plus."""
    return "n/a" if value is None else f"{value:+#.3g}".rstrip(".").replace("-", "−")


def seconds(value: float | int | None) -> str:
    """A duration: `8.4 s`, `3 min 07 s`, `2 h 05 min`."""
    if value is None:
        return "n/a"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


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


def _dots(accuracies: Sequence[Row]) -> dict[str, Any]:
    """Accuracies placed on one scale that shows chance and every interval; positions in per cent of the width."""
    rows = [row for row in accuracies if row["accuracy"] is not None]
    ends = [x for row in rows for x in (row.get("ci95") or [row["accuracy"]])]
    low = max(0.0, math.floor(20 * min([*ends, 0.5]) - 0.2) / 20)
    high = min(1.0, math.ceil(20 * max([*ends, 0.55]) + 0.2) / 20)

    def place(x: float) -> float:
        return round(100 * (x - low) / (high - low), 2)

    placed = []
    for row in rows:
        start, end = row.get("ci95") or (row["accuracy"], row["accuracy"])
        placed.append(
            {**row, "start": place(start), "width": round(place(end) - place(start), 2), "at": place(row["accuracy"])}
        )
    return {"rows": placed, "chance": place(0.5), "low": low, "high": high}


def _figure(caption: str, svg: str) -> dict[str, Any]:
    """An SVG as the source of an <img>: there it can run no script, and its ids do not meet those of other figures."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    return {
        "caption": clean_text(caption),
        "source": "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(),
        "wide": size is not None and float(size[1]) > 2.5 * float(size[2]),
    }


def _interval(row: Row, key: str = "ci95") -> str:
    return f"{percent(row[key][0])} to {percent(row[key][1])}" if row.get(key) else ""


def _cell(value: Any) -> str:
    return escape_markdown(number(value))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return [f"## {title}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
