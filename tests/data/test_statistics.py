import time

import numpy as np
import pytest

from sarm.data.statistics import (
    bootstrap_means,
    calibration,
    cluster_bootstrap,
    cluster_sums,
    pair_credit,
    reliability_bins,
    wilson_interval,
)


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


def test_calibration_matches_hand_numbers():
    # p = .8808, .6225, .2689; confidences .8808, .6225, .7311 earn 1, 1, 0, each in a bin of its own.
    result = calibration(np.array([2.0, 0.5, -1.0]))
    assert result.brier == pytest.approx(0.230398, abs=1e-6)
    assert result.nll == pytest.approx(0.638089, abs=1e-6)
    assert result.ece == pytest.approx((0.1192 + 0.3775 + 0.7311) / 3, abs=1e-4)


def test_calibration_survives_huge_margins():
    result = calibration(np.array([1e4, -1e4]))
    assert result.nll == pytest.approx(5e3)
    assert result.brier == pytest.approx(0.5)


def test_ece_is_small_where_margins_mean_what_they_say_and_large_where_they_do_not():
    rng = np.random.default_rng(0)
    size_N = rng.uniform(0, 3, 20_000)
    won = rng.random(20_000) < 1 / (1 + np.exp(-size_N))
    honest_N = np.where(won, size_N, -size_N)
    assert calibration(honest_N).ece < 0.02
    assert calibration(4 * honest_N).ece > 0.1


def test_reliability_bins_hold_equally_many_pairs_and_ignore_row_order():
    margins_N = np.random.default_rng(1).integers(-5, 6, 100).astype(float)
    bins = reliability_bins(margins_N)
    assert bins.num_pairs.sum() == 100
    assert np.ptp(bins.num_pairs) <= 1
    np.testing.assert_allclose(reliability_bins(margins_N[::-1]).accuracy, bins.accuracy)


def test_pair_credit_gives_half_to_an_exact_tie_only():
    assert pair_credit(np.array([1e-30, 0.0, -0.0, -1e-30])).tolist() == [1, 0.5, 0.5, 0]


def test_bootstrap_agrees_with_a_loop_over_resamples():
    rng = np.random.default_rng(0)
    clusters_N = rng.integers(0, 40, 200)
    values_N = rng.random(200)
    parts = [values_N[clusters_N == c] for c in np.unique(clusters_N)]
    means = []
    for _ in range(4000):
        drawn = [parts[i] for i in rng.integers(len(parts), size=len(parts))]
        means.append(np.concatenate(drawn).mean())
    assert cluster_bootstrap(values_N, clusters_N, 4000, 1) == pytest.approx(
        np.quantile(means, [0.025, 0.975]), abs=5e-3
    )


def test_bootstrap_covers_the_true_mean_of_clustered_data_about_95_times_in_100():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        # Beta(2, 1) prompts with 6 pairs each: the true accuracy is 2/3, and pairs of a prompt go together.
        share_C = rng.beta(2, 1, 60)
        values_N = (rng.random((60, 6)) < share_C[:, None]).astype(float).ravel()
        low, high = cluster_bootstrap(values_N, np.repeat(np.arange(60), 6), 1000, seed)
        covered += low <= 2 / 3 <= high
    assert 180 <= covered <= 196


def test_bootstrap_of_clusters_is_wider_than_of_their_members():
    values_N = np.repeat(np.random.default_rng(0).integers(0, 2, 50), 10).astype(float)
    clustered = cluster_bootstrap(values_N, np.repeat(np.arange(50), 10), 2000, 0)
    single = cluster_bootstrap(values_N, np.arange(500), 2000, 0)
    assert clustered.high - clustered.low > 2 * (single.high - single.low)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_bootstrap_falls_back_to_wilson_on_clusters_where_nothing_varies(value):
    interval = cluster_bootstrap(np.full(30, value), np.repeat(np.arange(10), 3), 500, 0)
    assert interval == wilson_interval(10 * value, 10)


def test_bootstrap_claims_no_certainty_from_one_cluster():
    interval = cluster_bootstrap(np.array([1.0, 0.0, 1.0, 1.0]), np.array(["a"] * 4), 500, 0)
    assert interval == wilson_interval(0.75, 1)


def test_bootstrap_repeats_with_its_seed_and_refuses_nothing():
    values_N, clusters_N = np.random.default_rng(0).random(50), np.arange(50)
    assert cluster_bootstrap(values_N, clusters_N, 500, 7) == cluster_bootstrap(values_N, clusters_N, 500, 7)
    with pytest.raises(ValueError, match="as many cluster ids as values"):
        cluster_bootstrap(values_N[:0], clusters_N[:0], 500, 7)


def test_ten_thousand_resamples_of_three_hundred_clusters_take_well_under_a_second():
    rng = np.random.default_rng(0)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        cluster_bootstrap(rng.random(3000), rng.integers(0, 300, 3000), 10_000, 0)
        times.append(time.perf_counter() - start)
    assert min(times) < 1


def test_the_bootstrap_of_columns_agrees_with_that_of_one_column_and_keeps_clusters_whole():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    values = rng.normal(size=(len(clusters), 2)) + rng.normal(size=12)[clusters][:, None]
    low, high = bootstrap_means(values, clusters, 4000, 0)
    for column in (0, 1):
        one = cluster_bootstrap(values[:, column], clusters, 4000, 1)
        np.testing.assert_allclose([low[column], high[column]], one, atol=0.06)
    brute = np.stack([values[clusters == c].sum(0) for c in range(12)])
    np.testing.assert_allclose(cluster_sums(values, clusters), brute)
    assert (high - low > 1.2 * (2 * 1.96 * values.std(0) / np.sqrt(len(values)))).all(), "clusters widen an interval"
