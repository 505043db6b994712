"""Claims are decided by their intervals alone, and by the rule that the page states."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.evidence.verdicts import Measured, smallest_seen, verdict

ENOUGH = {"prompts": 40, "seeds": 3}


@pytest.mark.parametrize(
    ("low", "high", "bound", "expected"),
    [
        (0.01, 0.05, 0.0, "shown"),
        (-0.01, 0.05, 0.0, "not shown"),
        (0.0, 0.05, 0.0, "not shown"),
        (-0.05, -0.01, 0.0, "contradicted"),
        (-0.01, 0.05, -0.02, "shown"),
        (-0.05, -0.03, -0.02, "contradicted"),
    ],
)
def test_an_interval_decides(low: float, high: float, bound: float, expected: str) -> None:
    assert verdict(Measured((low + high) / 2, low, high, **ENOUGH), bound, trains=True) == expected


def test_too_few_prompts_or_seeds_decide_nothing() -> None:
    clear = {"value": 0.5, "low": 0.4, "high": 0.6}
    assert verdict(Measured(**clear, prompts=39, seeds=3), 0.0, trains=True) == "not measured"
    assert verdict(Measured(**clear, prompts=40, seeds=2), 0.0, trains=True) == "not measured"
    assert verdict(Measured(**clear, prompts=40), 0.0, trains=False) == "shown"
    assert verdict(None, 0.0, trains=False) == "not measured"
    assert verdict(Measured(0.5, math.nan, math.nan, **ENOUGH), 0.0, trains=True) == "not measured"


@given(st.floats(-1, 1), st.floats(0.001, 1), st.floats(-1, 1))
def test_what_is_shown_is_never_contradicted_from_the_other_side(middle: float, half: float, bound: float) -> None:
    above = verdict(Measured(middle, middle - half, middle + half, **ENOUGH), bound, trains=True)
    below = verdict(Measured(-middle, -middle - half, -middle + half, **ENOUGH), -bound, trains=True)
    mirrored = {"shown": "contradicted", "contradicted": "shown", "not shown": "not shown"}
    assert below == mirrored[above]


def test_the_smallest_difference_that_is_seen_is_found_in_four_of_five_studies() -> None:
    """By drawing studies: a difference of that size, normal errors, and the rule."""
    error = 0.03
    size = smallest_seen(Measured(0.0, -1.959963984540054 * error, 1.959963984540054 * error, **ENOUGH))
    found = np.random.default_rng(0).normal(size, error, 200_000)
    assert np.mean(found - 1.959963984540054 * error > 0) == pytest.approx(0.8, abs=0.005)
