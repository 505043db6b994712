"""The table of an ablation: a row for each cell, and for each setting the mean over its seeds with an interval."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

AXES = ("component", "layer", "width", "k")
METRIC = "heldout_accuracy"
DIFFERENCE = ("minus_centre", "minus_centre_low", "minus_centre_high")
Row = Mapping[str, Any]


class Setting(NamedTuple):
    """All seeds of one (component, layer, width, k, and further axes).

    `low` and `high` are the 95 % bounds over held-out prompts, the mean of the seeds' own; `seeds_low` and `seeds_high` Student's over
    the seeds, NaN for one. `minus_centre` is the difference from the SARM at the centre with the same seed, on the same prompts.
    """

    component: str
    layer: int
    width: int
    k: int
    num_seeds: int
    mean: float
    low: float
    high: float
    seeds_low: float
    seeds_high: float
    minus_centre: float
    minus_centre_low: float
    minus_centre_high: float
    fvu: float
    seconds: float
    further: tuple[Any, ...] = ()
    """Its values on the further axes, in their order; None on one that makes no difference to it."""


def settings_of(rows: Sequence[Row], further: Sequence[str] = ()) -> list[Setting]:
    """The settings that have a finished cell, best first; `further` are the axes besides layer, width and k."""
    axes = (*AXES, *further)
    done = [row for row in rows if row["status"] == "done"]
    keys = dict.fromkeys(tuple(row[name] for name in axes) for row in done)
    found = []
    for key in keys:
        own = [row for row in done if tuple(row[name] for name in axes) == key]
        values = np.array([row[METRIC] for row in own], float)
        means = [_mean(own, name) for name in ("ci95_low", "ci95_high", *DIFFERENCE, "fvu_heldout", "training_seconds")]
        over_seeds = seed_interval(values) if len(own) > 1 else (math.nan, math.nan)
        figures = (len(own), float(values.mean()), *means[:2], *over_seeds, *means[2:])
        found.append(Setting(*key[: len(AXES)], *figures, further=key[len(AXES) :]))  # type: ignore[misc]
    return sorted(found, key=lambda setting: -setting.mean)


def _mean(rows: Sequence[Row], name: str) -> float:
    values = [value for row in rows if (value := row.get(name)) is not None]
    return float(np.mean(values)) if values else math.nan


def seed_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean of two or more values."""
    array = np.asarray(values, float)
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return float(array.mean()) - half, float(array.mean()) + half


def best_row(rows: Sequence[Row]) -> Row | None:
    """The finished cell with an SAE that was trained for it with the highest held-out accuracy, the first of equals; None if there is none."""
    done = [row for row in rows if row["status"] == "done" and row["component"] in ("sarm", "token_sae")]
    return max(done, key=lambda row: row[METRIC], default=None)


def shown(value: Any) -> str:
    """A value of a further axis as a reader sees it; nothing for one that makes no difference."""
    return "" if value is None else f"{value:g}" if isinstance(value, int | float) else str(value).replace("|", "/")


def as_markdown(rows: Sequence[Row], name: str, further: Sequence[str] = ()) -> str:
    """The settings, the cells that have no result, and how to read both; a column for each of the `further` axes."""
    lines = [
        f"# {name}",
        "",
        f"| component | layer | width | k |{''.join(f' {axis} |' for axis in further)} seeds | held-out accuracy | 95 % over prompts | over seeds | minus the centre | FVU | training s |",
        f"|---|--:|--:|--:|{'--:|' * len(further)}--:|--:|--:|--:|--:|--:|--:|",
    ]
    for s in settings_of(rows, further):
        width, k = (f"{s.width}x", str(s.k)) if s.width else ("", "")
        fvu = "" if math.isnan(s.fvu) else f"{s.fvu:.3f}"
        over_seeds = "" if math.isnan(s.seeds_low) else f"{s.seeds_low:.3f} to {s.seeds_high:.3f}"
        minus = f"{s.minus_centre:+.3f} ({s.minus_centre_low:+.3f} to {s.minus_centre_high:+.3f})"
        cells = [
            s.component,
            s.layer or "all",
            width,
            k,
            *map(shown, s.further),
            s.num_seeds,
            f"{s.mean:.3f}",
            f"{s.low:.3f} to {s.high:.3f}",
            over_seeds,
            "" if math.isnan(s.minus_centre) else minus,
            fvu,
            f"{s.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    without = [row for row in rows if row["status"] != "done"]
    if without:
        lines += ["", "| without a result | why |", "|---|---|"]
        lines += [f"| {row['cell']} | {row['status']}: {str(row['reason']).replace('|', '/')} |" for row in without]
    lines += [
        "",
        "Intervals are 95 %: over held-out prompts (the mean of the seeds' bounds), and Student's t over the seeds. Minus the "
        "centre: paired, against the SARM at the centre with the same seed on the same prompts. The best cell was chosen on these "
        "held-out pairs, so its own figure flatters it.",
        "",
    ]
    return "\n".join(lines)
