"""The table of an ablation: means over seeds, intervals of both kinds, what has no result."""

import math

import numpy as np
import pytest
from scipy import stats

from sarm.report.sweep_figures import accuracy_by_axis, accuracy_by_cost
from sarm.report.sweep_table import as_markdown, best_row, seed_interval, settings_of


def row(component: str = "sarm", seed: int = 0, accuracy: float = 0.8, **more: object) -> dict:
    return {
        "cell": f"{component}-s{seed}",
        "component": component,
        "layer": 2,
        "width": 4,
        "k": 8,
        "seed": seed,
        "status": "done",
        "heldout_accuracy": accuracy,
        "ci95_low": accuracy - 0.05,
        "ci95_high": accuracy + 0.05,
        "training_seconds": 10.0,
        **more,
    }


def test_seeds_of_one_setting_are_one_row_with_both_intervals():
    values = [0.80, 0.84, 0.82]
    (setting,) = settings_of([row(seed=seed, accuracy=value) for seed, value in enumerate(values)])
    assert (setting.num_seeds, setting.mean) == (3, pytest.approx(0.82))
    assert (setting.low, setting.high) == pytest.approx((0.77, 0.87))
    expected = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (setting.seeds_low, setting.seeds_high) == pytest.approx(expected)
    assert seed_interval(values) == pytest.approx(expected)


def test_one_seed_has_no_interval_over_seeds_and_a_missing_figure_is_none_of_zero():
    (setting,) = settings_of([row()])
    assert math.isnan(setting.seeds_low)
    assert math.isnan(setting.fvu)
    assert math.isnan(setting.minus_centre)
    line = next(line for line in as_markdown([row()], "x").splitlines() if line.startswith("| sarm"))
    assert line == "| sarm | 2 | 4x | 8 | 1 | 0.800 | 0.750 to 0.850 |  |  |  | 10 |"


def test_the_best_is_a_finished_sarm_and_the_others_are_named():
    rows = [
        row("scalar", accuracy=0.9),
        row(accuracy=0.7),
        row(seed=1, accuracy=0.8),
        row(seed=2, accuracy=1.0, status="failed", reason="a | b"),
    ]
    assert best_row(rows)["seed"] == 1
    assert [setting.component for setting in settings_of(rows)] == ["scalar", "sarm"]
    assert "| sarm-s2 | failed: a / b |" in as_markdown(rows, "x")
    assert best_row([rows[0]]) is None


def test_further_axes_are_columns_and_panels_and_empty_where_they_make_no_difference():
    axes = ("sae.architecture", "reward.lr")
    rows = [
        row(accuracy=0.8, **{"sae.architecture": "topk", "reward.lr": 1e-6}),
        row(accuracy=0.7, **{"sae.architecture": "jumprelu", "reward.lr": 1e-6}),
        row("scalar", accuracy=0.6, **{"sae.architecture": None, "reward.lr": 1e-6}),
    ]
    assert [setting.further for setting in settings_of(rows, axes)] == [
        ("topk", 1e-6),
        ("jumprelu", 1e-6),
        (None, 1e-6),
    ]
    text = as_markdown(rows, "x", axes)
    assert "| k | sae.architecture | reward.lr | seeds |" in text
    assert "| sarm | 2 | 4x | 8 | topk | 1e-06 | 1 | 0.800 |" in text
    assert "| scalar | 2 | 4x | 8 |  | 1e-06 | 1 | 0.600 |" in text
    header, rule = text.splitlines()[2:4]
    assert header.count("|") == rule.count("|")
    panels = accuracy_by_axis(rows, {"sae.architecture": "topk", "reward.lr": 1e-6}, axes).axes
    assert [panel.get_xlabel() for panel in panels[3:]] == list(axes)
    assert [tick.get_text() for tick in panels[3].get_xticklabels()] == ["jumprelu", "topk"]
    labels = [text.get_text() for text in accuracy_by_cost(settings_of(rows, axes)).axes[0].texts]
    assert labels == ["L2 4x k8 topk 1e-06", "L2 4x k8 jumprelu 1e-06", "scalar 1e-06"]
