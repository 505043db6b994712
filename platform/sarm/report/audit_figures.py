"""Figures of an audit; like `interpret.figures`, each function returns a matplotlib Figure that belongs to nobody else."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2f86c6", "#d9731a", "#7d7d7d"
_STYLES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", "--"), ("x", ":"))


def dose_response(strengths: Sequence[float], own: Mapping[str, Any], controls: Mapping[str, Any], kind: str) -> Figure:  # fmt: skip
    """Mean shift of the margin and accuracy by strength, on the target and off it, with the matched controls' middle 90 %.

    `own` has `target_margin`, `off_margin`, `target_accuracy`, `off_accuracy`; `controls` `target_margin` and `target_accuracy` [A, G].
    """
    figure, (left, right) = _figure(2)
    order = np.argsort(strengths)
    x = np.array(strengths)[order]
    for axes, name, label in ((left, "margin", "mean shift of the margin"), (right, "accuracy", "pairwise accuracy")):
        band = np.array(controls[f"target_{name}"])[order]
        axes.fill_between(x, *np.quantile(band, [0.05, 0.95], axis=1), color=GREY, alpha=0.25, label="matched controls, target")  # fmt: skip
        axes.plot(x, np.array(own[f"target_{name}"])[order], color=BLUE, marker="o", label="features, target")
        axes.plot(x, np.array(own[f"off_{name}"])[order], color=ORANGE, marker="s", linestyle="--", label="features, off target")  # fmt: skip
        axes.set(xlabel=f"strength ({kind})", ylabel=label)
        _plain(axes)
    left.legend(frameon=False, fontsize=8, labelcolor=GREY)
    return figure


def pareto(own: Sequence[Mapping[str, float]], controls_target: Any, controls_off: Any) -> Figure:
    """Change of the target's accuracy against the largest change off target, a point per strength; controls in grey."""
    figure, (axes,) = _figure(1)
    axes.scatter(np.ravel(controls_off), np.ravel(controls_target), s=6, color=GREY, alpha=0.3, label="matched controls")  # fmt: skip
    axes.plot([p["off"] for p in own], [p["target"] for p in own], color=BLUE, marker="o", linewidth=1, label="features")  # fmt: skip
    for point in own:
        axes.annotate(f"{point['strength']:g}", (point["off"], point["target"]), (4, 3), textcoords="offset points", fontsize=7, color=GREY)  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="largest change of accuracy off target", ylabel="change of target accuracy")
    _plain(axes)
    axes.legend(frameon=False, fontsize=8, labelcolor=GREY)
    return figure


def reward_shift(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
    """Rewards of chosen responses before and after an edit, one panel per set (SARM figure 3)."""
    figure, panels = _figure(len(before))
    for axes, name in zip(panels, before, strict=True):
        both = np.concatenate([before[name], after[name]])
        bins = np.histogram_bin_edges(both, bins=40).tolist()
        axes.hist(before[name], bins, color=GREY, alpha=0.5, density=True, label="before")
        axes.hist(after[name], bins, color=BLUE, histtype="step", linewidth=1.8, density=True, label="after")
        axes.set(title=name, xlabel="reward of chosen responses", ylabel="density")
        axes.title.set_color(GREY)
        _plain(axes)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=GREY)
    return figure


def budget_curves(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float]) -> Figure:
    """Target and off-target accuracy by share of changed pairs, a line per method; `rows` have method, share, target and off."""
    figure, panels = _figure(2)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for axes, name, title in zip(panels, ("target", "off"), ("target", "off target"), strict=True):
        axes.axhline(baseline[name], color=GREY, linewidth=0.8, linestyle=":")
        for i, method in enumerate(methods):
            own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["share"])
            marker, line = _STYLES[i % len(_STYLES)]
            colour = BLUE if method.startswith("features") else ORANGE if i % 2 else GREY
            axes.plot([100 * row["share"] for row in own], [row[name] for row in own], color=colour, marker=marker, markersize=4, linestyle=line, linewidth=1.3, label=method)  # fmt: skip
        axes.set(title=title, xlabel="changed pairs (%)", ylabel="held-out accuracy")
        axes.title.set_color(GREY)
        _plain(axes)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=GREY)
    return figure


def _figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * num_panels if num_panels > 1 else 6.4, 3.8), layout="constrained", facecolor="none")
    return figure, list(np.ravel(figure.subplots(1, num_panels)))


def _plain(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=GREY)
    for item in (axes.xaxis.label, axes.yaxis.label):
        item.set_color(GREY)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GREY)
