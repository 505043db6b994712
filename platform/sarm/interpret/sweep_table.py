"""The table of an ablation: a row for each cell, and for each setting the mean over its seeds with an interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

AXES = ("component", "layer", "width", "k")
METRIC = "heldout_accuracy"
Row = Mapping[str, Any]


class Setting(NamedTuple):
    """All seeds of one (component, layer, width, k); the interval is Student's t over two or more seeds, else the bootstrap's over prompts."""

    component: str
    layer: int
    width: int
    k: int
    num_seeds: int
    mean: float
    low: float
    high: float
    fvu: float
    seconds: float


def settings_of(rows: Sequence[Row]) -> list[Setting]:
    """The settings that have a finished cell, best first."""
    done = [row for row in rows if row["status"] == "done"]
    keys = dict.fromkeys(tuple(row[name] for name in AXES) for row in done)
    found = []
    for key in keys:
        own = [row for row in done if tuple(row[name] for name in AXES) == key]
        values = np.array([row[METRIC] for row in own], float)
        low, high = seed_interval(values) if len(own) > 1 else (own[0]["ci95_low"], own[0]["ci95_high"])
        fvu = float(np.mean([row.get("fvu_heldout") or math.nan for row in own]))
        seconds = float(np.mean([row["training_seconds"] for row in own]))
        found.append(Setting(*key, len(own), float(values.mean()), low, high, fvu, seconds))  # type: ignore[call-arg]
    return sorted(found, key=lambda setting: -setting.mean)


def seed_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean of two or more values."""
    array = np.asarray(values, float)
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def best_row(rows: Sequence[Row]) -> Row | None:
    """The finished cell with an SAE that was trained for it with the highest held-out accuracy, the first of equals; None if there is none."""
    done = [row for row in rows if row["status"] == "done" and row["component"] in ("sarm", "token_sae")]
    return max(done, key=lambda row: row[METRIC], default=None)


def as_markdown(rows: Sequence[Row], name: str) -> str:
    """The settings, the cells that have no result, and how to read both."""
    lines = [
        f"# {name}",
        "",
        "| component | layer | width | k | seeds | held-out accuracy | 95 % interval | FVU | training s |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for s in settings_of(rows):
        width, k = (f"{s.width}x", str(s.k)) if s.width else ("", "")
        fvu = "" if math.isnan(s.fvu) else f"{s.fvu:.3f}"
        lines.append(
            f"| {s.component} | {s.layer or 'all'} | {width} | {k} | {s.num_seeds} | {s.mean:.3f} | {s.low:.3f} to {s.high:.3f} | {fvu} | {s.seconds:.0f} |"
        )
    without = [row for row in rows if row["status"] != "done"]
    if without:
        lines += ["", "| without a result | why |", "|---|---|"]
        lines += [f"| {row['cell']} | {row['status']}: {str(row['reason']).replace('|', '/')} |" for row in without]
    lines += [
        "",
        "Intervals: Student's t over two or more seeds, else over resampled held-out prompts of the one seed. The best cell was chosen on "
        "the same held-out pairs, so its own figure flatters it.",
        "",
    ]
    return "\n".join(lines)
