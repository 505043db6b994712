"""Figures of an ablation: held-out accuracy against layer, width and k, and against cost."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from sarm.report.figures import BLUE, GREY, LINES, ORANGE, _figure, _legend, _percent
from sarm.report.sweep_table import METRIC, Row, Setting, settings_of

_AXES = {"layer": "layer of the SAE", "width": "dictionary size (x d_in)", "k": "active latents (k)"}


def accuracy_by_axis(rows: Sequence[Row], centre: tuple[int, int, int] | None) -> Figure:
    """One panel an axis: the mean over the SARM cells at each value (the other axes at the centre, where there is one).

    Bars are 95 % intervals over held-out prompts, small points all SARM cells. Lines across are the other components.
    """
    done = [row for row in rows if row["status"] == "done"]
    figure, panels = _figure(len(_AXES))
    names = list(_AXES)
    for place, (axes, (name, label)) in enumerate(zip(panels, _AXES.items(), strict=True)):
        mine = [row for row in done if row["component"] == "sarm"]
        axes.plot([r[name] for r in mine], [r[METRIC] for r in mine], ".", color=GREY, alpha=0.5, markersize=4)
        if centre is not None:
            mine = [r for r in mine if all(r[other] == centre[i] for i, other in enumerate(names) if i != place)]
        points = [
            (value, *_mean([row for row in mine if row[name] == value])) for value in sorted({r[name] for r in mine})
        ]
        if points:
            values, means, lows, highs = (np.array(column, float) for column in zip(*points, strict=True))
            bars = np.clip([means - lows, highs - means], 0, None)
            axes.errorbar(values, means, yerr=bars, marker="o", capsize=3, label="sarm", **LINES[0])
            axes.set_xticks(values, [f"{value:g}" for value in values])
        others = [s for s in settings_of(rows) if s.component != "sarm"]
        for number, component in enumerate(dict.fromkeys(s.component for s in others)):
            level = float(np.mean([s.mean for s in others if s.component == component]))
            style = LINES[1 + number % 2]
            axes.axhline(level, linewidth=1.2, label=component.replace("_", " "), **style)
        axes.set(xlabel=label, ylabel="held-out accuracy")
        _percent(axes)
    if done:
        _legend(panels[0])
    return figure


def accuracy_by_cost(settings: Sequence[Setting]) -> Figure:
    """Held-out accuracy against seconds of reward training, one point a setting with its interval."""
    figure, (axes,) = _figure(1, height=3.6, width=5.4)
    for name, colour in (("sarm", BLUE), ("", ORANGE)):
        own = [s for s in settings if (s.component == "sarm") == bool(name)]
        if own:
            means = np.array([s.mean for s in own])
            bars = np.clip([means - [s.low for s in own], [s.high for s in own] - means], 0, None)
            axes.errorbar([s.seconds for s in own], means, yerr=bars, fmt="o", capsize=2, color=colour, linewidth=1)
        for s in own:
            about = f"L{s.layer} {s.width}x k{s.k}" if name else s.component.replace("_", " ")
            axes.annotate(about, (s.seconds, s.mean), xytext=(4, 3), textcoords="offset points", fontsize=7, color=GREY)
    axes.set(xlabel="seconds of reward training", ylabel="held-out accuracy")
    _percent(axes)
    return figure


def _mean(rows: Sequence[Row]) -> tuple[float, float, float]:
    mean, low, high = (float(np.mean([row[name] for row in rows])) for name in (METRIC, "ci95_low", "ci95_high"))
    return mean, low, high
