"""Intervals over few, unequal prompts: hand numbers, edges, and how often they hold the truth."""

import numpy as np
import pytest

from sarm.evaluate.intervals import difference_interval, mean_interval, share_interval, wilson_interval

# Pairs a prompt as in the demo's safety pairs: a third alone, half with some ten, a sixth with sixty.
SIZES = np.array([1] * 29 + [2] + [5] * 2 + [6] * 9 + [8] + [9] * 3 + [10] * 28 + [12, 13, 14, 14, 20, 24, 25, 26, 26, 29, 31, 33, 36, 40, 49, 49, 56, 58] + [60] * 13)  # fmt: skip


@pytest.mark.parametrize(("successes", "total", "low", "high"), [(144, 183, 0.7220, 0.8400), (64, 160, 0.3273, 0.4774)])
def test_wilson_matches_published_intervals(successes, total, low, high):
    assert wilson_interval(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_keeps_its_width_at_none_and_at_all():
    assert wilson_interval(0, 10).low == 0 < wilson_interval(0, 10).high
    assert wilson_interval(10, 10).low < 1 == wilson_interval(10, 10).high


@pytest.mark.parametrize(("successes", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(successes, total):
    with pytest.raises(ValueError, match="expected 0 <= successes"):
        wilson_interval(successes, total)


def test_a_share_of_single_pairs_is_wilsons():
    values = np.array([1.0] * 7 + [0.0] * 3)
    assert share_interval(values, np.arange(10)) == pytest.approx(wilson_interval(7, 10))
    assert share_interval(np.ones(10), np.arange(10)) == wilson_interval(10, 10)


def test_prompts_that_agree_within_count_as_one_pair_each():
    values, clusters = np.repeat([1.0] * 28 + [0.0] * 12, 6), np.repeat(np.arange(40), 6)
    low, high = share_interval(values, clusters)
    assert (low, high) == pytest.approx(wilson_interval(28, 40), abs=0.01)
    alone = share_interval(values, np.arange(240))
    assert high - low > 2.2 * (alone.high - alone.low)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_where_nothing_varies_effective_prompts_count(value):
    """Three prompts of 8, 1 and 1 pairs say as much as 100 / 66 prompts of one size."""
    clusters = np.array([0] * 8 + [1, 2])
    found = share_interval(np.full(10, value), clusters)
    assert found == pytest.approx(wilson_interval(value * 100 / 66, 100 / 66))
    assert 0 <= found.low <= value <= found.high <= 1
    assert found.high - found.low > 0.5


def test_intervals_never_leave_their_range():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size_C = rng.choice(SIZES, rng.integers(1, 20))
        clusters = np.repeat(np.arange(len(size_C)), size_C)
        right = (rng.random(len(clusters)) < rng.choice([0.02, 0.5, 0.98])).astype(float)
        low, high = share_interval(right, clusters)
        assert 0 <= low <= right.mean() <= high <= 1
        gain = right - (rng.random(len(clusters)) < 0.98)
        low, high = difference_interval(gain, clusters)
        assert -1 <= low <= gain.mean() <= high <= 1


def test_one_prompt_claims_no_certainty():
    values, one = np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4)
    assert share_interval(values, one) == wilson_interval(0.75, 1)
    low, high = difference_interval(values - 0.75, one)
    assert high - low > 1.5
    assert np.isnan(mean_interval(values, one)).all()


def test_no_difference_anywhere_is_bounded_by_what_unseen_prompts_could_show():
    assert difference_interval(np.zeros(30), np.repeat(np.arange(10), 3)) == pytest.approx(
        (-wilson_interval(0, 10).high, wilson_interval(0, 10).high)
    )


@pytest.mark.parametrize("num_prompts", [1, 2, 5, 6, 30])
def test_a_difference_that_few_prompts_share_may_be_none(num_prompts):
    low, high = difference_interval(np.full(3 * num_prompts, -1.0), np.repeat(np.arange(num_prompts), 3))
    assert low == -1
    assert (high < 0) == (num_prompts >= 6)


def test_a_mean_of_single_values_is_students():
    values = np.random.default_rng(0).normal(5, 2, 12)
    low, high = mean_interval(values, np.arange(12))
    assert np.isnan(mean_interval(np.full(19, 0.3), np.arange(19))).all(), "that 19 prompts agree says little of others"
    assert mean_interval(np.full(20, 0.3), np.arange(20)) == pytest.approx((0.3, 0.3))
    half = 2.200985 * values.std(ddof=1) / np.sqrt(12)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-6)


@pytest.mark.parametrize("interval", [share_interval, difference_interval, mean_interval])
def test_an_interval_refuses_nothing_and_ids_that_do_not_fit(interval):
    for values, clusters in ((np.zeros(0), np.zeros(0)), (np.zeros(3), np.zeros(2))):
        with pytest.raises(ValueError, match="as many cluster ids as values"):
            interval(values, clusters)


@pytest.mark.parametrize(("interval", "value"), [(share_interval, -0.1), (share_interval, 1.1), (difference_interval, 1.5)])  # fmt: skip
def test_values_out_of_range_are_refused(interval, value):
    with pytest.raises(ValueError, match=r"expected values in \["):
        interval(np.array([0.5, value]), np.arange(2))


def right_pairs(rng: np.random.Generator, num_prompts: int, accuracy: float, icc: float):
    """Right or wrong pairs, of prompts whose accuracies are beta with this intraclass correlation; and their prompts."""
    size_C = rng.choice(SIZES, num_prompts)
    share_C = rng.beta(accuracy * (1 / icc - 1), (1 - accuracy) * (1 / icc - 1), num_prompts)
    clusters = np.repeat(np.arange(num_prompts), size_C)
    return (rng.random(len(clusters)) < share_C[clusters]).astype(float), clusters


@pytest.mark.parametrize("icc", [0.1, 0.4])
@pytest.mark.parametrize("accuracy", [0.6, 0.9])
@pytest.mark.parametrize(("num_prompts", "least", "most"), [(19, 0.905, 0.985), (44, 0.925, 0.975), (82, 0.93, 0.97)])
def test_the_interval_of_an_accuracy_holds_the_truth_over_prompts_of_the_demos_sizes(
    num_prompts, least, most, accuracy, icc
):
    """The bounds leave room for the chance of 1,500 worlds; the percentiles of resampled prompts hold it in 80 to 92 %."""
    held = 0
    for world in range(1500):
        values, clusters = right_pairs(np.random.default_rng(world), num_prompts, accuracy, icc)
        low, high = share_interval(values, clusters)
        held += low <= accuracy <= high
    assert least <= held / 1500 <= most


@pytest.mark.parametrize("num_prompts", [19, 44])
def test_equal_models_are_called_different_in_6_of_100_at_most(num_prompts):
    excluded = 0
    for world in range(1500):
        rng = np.random.default_rng(world)
        a, clusters = right_pairs(rng, num_prompts, 0.85, 0.2)
        shared = rng.random(len(a)) < 0.5
        other = (rng.random(len(a)) < rng.beta(3.4, 0.6, num_prompts)[clusters]).astype(float)
        b = np.where(shared, a, other)
        low, high = difference_interval(a - b, clusters)
        excluded += not low <= 0 <= high
    assert excluded / 1500 <= 0.065
