import xml.etree.ElementTree as ET

import numpy as np
import pyarrow as pa
import pytest

from sarm.contracts.tables import FEATURES_TABLE
from sarm.report import figures

HISTORY = [
    {"step": i, "fvu": 1 / (i + 1), "l0": 8.0, "dead_fraction": 0.1, "loss": 0.7, "accuracy": 0.5} for i in range(5)
]
BARS = [{"name": "SARM", "accuracy": 0.7, "ci95": [0.6, 0.8]}, {"name": "$x^$ & <b>", "accuracy": 0.5, "ci95": None}]
FEATURE_ROWS = [
    {f.name: 3 if f.name == "latent" else 0.25 for f in FEATURES_TABLE},
    {f.name: 4 if f.name == "latent" else -0.5 if "contribution" in f.name else 0.1 for f in FEATURES_TABLE},
]


def make(name):
    rng = np.random.default_rng(0)
    return {
        "sae": lambda: figures.sae_curves({"sentence ends": HISTORY, "chat ends": HISTORY[:1]}),
        "reward": lambda: figures.reward_curves({"SARM": HISTORY}),
        "histogram": lambda: figures.reward_histograms(rng.normal(size=50), np.array([np.nan, 1.0, 2.0])),
        "calibration": lambda: figures.calibration_plot(np.array([0.6, 0.9]), np.array([0.5, 1.0]), np.array([9, 9])),
        "accuracy": lambda: figures.accuracy_bars(BARS),
        "contributions": lambda: figures.contribution_bars(
            [{"latent": 1, "mean_contribution": 0.2}], [{"latent": 2, "mean_contribution": -0.1}]
        ),
        "scatter": lambda: figures.feature_scatter(pa.Table.from_pylist(FEATURE_ROWS, schema=FEATURES_TABLE)),
    }[name]()


ALL = ["sae", "reward", "histogram", "calibration", "accuracy", "contributions", "scatter"]


@pytest.mark.parametrize("name", ALL)
def test_every_figure_is_one_svg_element_that_repeats_byte_for_byte(name):
    svg = figures.as_svg(make(name))
    assert ET.fromstring(svg).tag.endswith("svg")
    assert svg.startswith("<svg")
    assert svg == figures.as_svg(make(name))


@pytest.mark.parametrize("name", ALL)
def test_every_axis_says_what_it_shows(name):
    for axes in make(name).axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or [t.get_text() for t in axes.get_yticklabels()]


def test_panels_without_data_are_left_out():
    assert len(make("reward").axes) == 2
    assert len(figures.reward_curves({"SARM": []}).axes) == 1


def test_figures_of_nothing_still_draw():
    nothing = np.array([])
    for figure in (
        figures.reward_histograms(nothing, nothing),
        figures.calibration_plot(nothing, nothing, np.array([], np.int64)),
        figures.feature_scatter(FEATURES_TABLE.empty_table()),
        figures.contribution_bars([], []),
        figures.accuracy_bars([]),
    ):
        assert figures.as_svg(figure).startswith("<svg")


def test_save_figure_writes_the_format_of_the_suffix(tmp_path):
    figures.save_figure(make("accuracy"), tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
