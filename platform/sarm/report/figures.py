"""Figures of a run. Each function returns a matplotlib Figure that belongs to nobody else (no pyplot, no global state).

The two main colours differ in lightness and in hue on the blue-orange axis, which all common kinds of colour blindness
keep; text and axes are a mid-grey that is readable on white and on near-black, since the SVGs are transparent.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

BLUE, ORANGE, GREY = "#2f86c6", "#d9731a", "#7d7d7d"
# Colour, line style and width together, so that no curve is told apart by colour alone.
LINES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "linestyle": "-"},
    {"color": ORANGE, "linestyle": "--"},
    {"color": GREY, "linestyle": ":"},
)
SAE_PANELS = {
    "fvu": "fraction of variance unexplained",
    "l0": "active latents per token (L0)",
    "dead_fraction": "share of dead latents",
}
REWARD_PANELS = {
    "loss": "Bradley-Terry loss (nats per pair)",
    "accuracy": "pairwise accuracy",
    "margin": "mean margin (logits)",
}

History = Sequence[Mapping[str, Any]]


def sae_curves(histories: Mapping[str, History]) -> Figure:
    """FVU, L0 and dead share by step, one line per name (e.g. a training phase); each row has `step` and metrics."""
    return _curves(histories, SAE_PANELS)


def density_histograms(histograms: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """How many latents fire on what share of rows: per name edges in `log10_density` and counts in `latents`."""
    figure, (axes,) = _figure(1)
    for (name, histogram), line in zip(histograms.items(), LINES, strict=False):
        axes.stairs(histogram["latents"], histogram["log10_density"], label=_label(name), **line)
    axes.set(xlabel="share of rows a latent fires on (log10)", ylabel="latents")
    _legend(axes)
    return figure


def reward_curves(histories: Mapping[str, History]) -> Figure:
    """Loss, accuracy and margin by step, one line per name (e.g. SARM and scalar head)."""
    return _curves(histories, REWARD_PANELS)


def reward_histograms(chosen_N: Float[np.ndarray, " chosen"], rejected_N: Float[np.ndarray, " rejected"]) -> Figure:
    """Distributions of the rewards of chosen and rejected responses, over the same bins."""
    figure, (axes,) = _figure(1)
    chosen_N, rejected_N = chosen_N[np.isfinite(chosen_N)], rejected_N[np.isfinite(rejected_N)]
    both = np.concatenate([chosen_N, rejected_N])
    bins = np.histogram_bin_edges(both, bins=40).tolist()
    axes.hist(rejected_N, bins, color=ORANGE, alpha=0.55, label="rejected")
    axes.hist(chosen_N, bins, color=BLUE, histtype="step", linewidth=1.8, label="chosen")
    axes.set(xlabel="reward (logits)", ylabel="held-out responses")
    _legend(axes)
    return figure


def reward_by_step(history: History, alarms: Sequence[int]) -> Figure:
    """The `reward` of each `{step, reward}`, and lines at the steps of alarms."""
    figure, (axes,) = _figure(1)
    axes.plot([one["step"] for one in history], [one["reward"] for one in history], color=BLUE, linewidth=1.2)
    for place, step in enumerate(alarms):
        axes.axvline(step, color=ORANGE, linestyle="--", linewidth=1, label=None if place else "alarm")
    axes.set(xlabel="step", ylabel="mean raw reward")
    if alarms:
        _legend(axes)
    return figure


def calibration_plot(
    confidence_B: Float[np.ndarray, " bins"],
    accuracy_B: Float[np.ndarray, " bins"],
    num_pairs_B: Int[np.ndarray, " bins"],
) -> Figure:
    """Accuracy against confidence sigmoid(|margin|) in bins of pairs; on the diagonal the margins mean what they say."""
    figure, (axes,) = _figure(1)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="perfectly calibrated")
    # Half-widths of a binomial interval: with few pairs a bin is off the diagonal by chance.
    error_B = 1.96 * np.sqrt(np.clip(accuracy_B * (1 - accuracy_B), 1e-9, None) / np.maximum(num_pairs_B, 1))
    axes.errorbar(confidence_B, accuracy_B, error_B, color=BLUE, marker="o", capsize=2, linewidth=1.4, label="held-out")
    low = float(min(0.45, (accuracy_B - error_B).min(initial=0.45)))
    axes.set(xlabel="confidence in the preferred response", ylabel="pairwise accuracy", ylim=(max(0.0, low), 1.02))
    _percent(axes, x=True)
    _legend(axes)
    return figure


def accuracy_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy with its 95 % interval of each `{name, accuracy, ci95}`; the first row is the one to look at."""
    figure, (axes,) = _figure(1, height=0.9 + 0.38 * len(rows))
    for y, row in enumerate(rows):
        low, high = row.get("ci95") or (row["accuracy"], row["accuracy"])
        colour = BLUE if y == 0 else GREY
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(row["accuracy"], y, color=colour, marker="o", markersize=7)
        axes.annotate(f"{row['accuracy']:.1%}", (high, y), (6, 0), textcoords="offset points", va="center", color=GREY)
    axes.axvline(0.5, color=GREY, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [_label(row["name"]) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="held-out pairwise accuracy, 95 % interval")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def difference_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Difference with its 95 % interval of each `{name, difference, ci95}`; blue where the interval leaves out zero."""
    figure, (axes,) = _figure(1, height=0.9 + 0.3 * len(rows))
    for y, row in enumerate(rows):
        low, high = row["ci95"]
        colour = BLUE if low > 0 or high < 0 else GREY
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(row["difference"], y, color=colour, marker="o", markersize=6)
    axes.axvline(0, color=GREY, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [_label(row["name"]) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="difference, 95 % interval")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def contribution_bars(raising: Sequence[Mapping[str, Any]], lowering: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean contribution of each `{latent, mean_contribution}`, from the most raising to the most lowering."""
    rows = [*raising, *reversed(lowering)]
    figure, (axes,) = _figure(1, height=0.9 + 0.2 * len(rows))
    values = [row["mean_contribution"] for row in rows]
    axes.barh(range(len(rows)), values, color=[BLUE if v > 0 else ORANGE for v in values], height=0.7)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"latent {row['latent']}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="mean contribution to the reward (logits)")
    return figure


def feature_scatter(features: pa.Table) -> Figure:
    """Head weight against how often a latent fires, for every row of FEATURES; colour is the side it favours."""
    figure, (axes,) = _figure(1)
    share_F = (features["frequency_chosen"].to_numpy() + features["frequency_rejected"].to_numpy()) / 2
    weight_F = features["weight"].to_numpy()
    favours_chosen = features["mean_margin_contribution"].to_numpy() >= 0
    for mask, colour, marker, name in (
        (favours_chosen, BLUE, "o", "widens margins"),
        (~favours_chosen, ORANGE, "^", "narrows margins"),
    ):
        axes.scatter(share_F[mask], weight_F[mask], s=12, c=colour, marker=marker, alpha=0.6, linewidths=0, label=name)
    axes.axhline(0, color=GREY, linewidth=0.8)
    if features.num_rows:
        axes.set_xscale("log")
    axes.set(xlabel="share of responses in which the latent fires", ylabel="head weight")
    _legend(axes)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure on white, in the format of the path's suffix."""
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight")


def as_svg(figure: Figure) -> str:
    """The figure as a transparent `<svg>` element; equal figures give equal text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "sarm", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _curves(histories: Mapping[str, History], panels: Mapping[str, str]) -> Figure:
    present = [key for key in panels if any(key in row for history in histories.values() for row in history)]
    figure, all_axes = _figure(max(1, len(present)))
    for axes, key in zip(all_axes, present, strict=False):
        for line, (name, history) in enumerate(histories.items()):
            points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                # A single point draws no line.
                marker = "o" if len(points) < 3 else ""
                axes.plot(steps, values, marker=marker, linewidth=1.5, label=_label(name), **LINES[line % len(LINES)])
        axes.set(xlabel="step", ylabel=panels[key])
        if key in ("accuracy", "dead_fraction"):
            _percent(axes)
    if present and len(histories) > 1:
        _legend(all_axes[0])
    return figure


def _figure(num_panels: int, height: float = 3.0, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * num_panels if num_panels > 1 else width + 0.8, height), layout="constrained")
    all_axes = [figure.add_subplot(1, num_panels, i + 1) for i in range(num_panels)]
    for axes in all_axes:
        axes.set_axisbelow(True)
        axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
        axes.tick_params(colors=GREY, labelsize=9, length=3)
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
    return figure, all_axes


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=GREY)


def _percent(axes: Axes, *, x: bool = False) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if x:
        axes.xaxis.set_major_formatter(PercentFormatter(1))


def _label(text: str) -> str:
    """A name as matplotlib would show it: a pair of `$` would start mathematics, and may fail to parse."""
    return text.replace("$", r"\$")
