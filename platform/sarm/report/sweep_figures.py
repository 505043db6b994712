"""Figures of an ablation: held-out accuracy against each axis, and against cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sarm.report.figures import BLUE, GREY, LINES, ORANGE, _figure, _label, _legend, _percent
from sarm.report.sweep_table import METRIC, Row, Setting, settings_of, shown

_AXES = {"layer": "layer of the SAE", "width": "dictionary size (x d_in)", "k": "active latents (k)"}


def accuracy_by_axis(rows: Sequence[Row], centre: Mapping[str, Any], further: Sequence[str] = ()) -> Figure:
    """One panel an axis: the mean over the SARM cells at each value (the other axes at the centre, where there is one).

    Bars are 95 % intervals over held-out prompts, small points all SARM cells. Lines across are the other components. Values of the
    `further` axes stand side by side, whatever lies between them.
    """
    done = [row for row in rows if row["status"] == "done"]
    labels = _AXES | {name: name for name in further}
    figure, panels = _figure(len(labels))
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        mine = [row for row in done if row["component"] == "sarm" and row[name] is not None]
        values = sorted({row[name] for row in mine})
        place = {value: number if name in further else value for number, value in enumerate(values)}
        axes.plot([place[r[name]] for r in mine], [r[METRIC] for r in mine], ".", color=GREY, alpha=0.5, markersize=4)
        mine = [
            row for row in mine if all(row[other] in (value, None) for other, value in centre.items() if other != name)
        ]
        points = [(value, *_mean(own)) for value in values if (own := [row for row in mine if row[name] == value])]
        if points:
            at, *figures = zip(*points, strict=True)
            means, lows, highs = (np.array(column, float) for column in figures)
            bars = np.clip([means - lows, highs - means], 0, None)
            places = np.array([place[value] for value in at], float)
            axes.errorbar(places, means, yerr=bars, marker="o", capsize=3, label="sarm", **LINES[0])
            axes.set_xticks(places, [_label(shown(value)) for value in at])
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
            about = _label(" ".join([about, *(shown(value) for value in s.further if value is not None)]))
            axes.annotate(about, (s.seconds, s.mean), xytext=(4, 3), textcoords="offset points", fontsize=7, color=GREY)
    axes.set(xlabel="seconds of reward training", ylabel="held-out accuracy")
    _percent(axes)
    return figure


def _mean(rows: Sequence[Row]) -> tuple[float, float, float]:
    mean, low, high = (float(np.mean([row[name] for row in rows])) for name in (METRIC, "ci95_low", "ci95_high"))
    return mean, low, high
