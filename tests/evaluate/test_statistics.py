import itertools

import numpy as np
import pytest

from sarm.evaluate.statistics import calibration, cluster_sums, pair_credit, reliability_bins, sign_flip_p_values


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


def test_cluster_sums_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    values = rng.normal(size=(len(clusters), 2))
    brute = np.stack([values[clusters == c].sum(0) for c in range(12)])
    np.testing.assert_allclose(cluster_sums(values, clusters), brute)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"), [(30, 23, 0.4101), (4, 3, 1.0), (0, 0, 1.0), (6, 0, 0.03125), (9, 2, 0.0654)]
)
def test_sign_flips_of_clusters_of_one_are_mcnemars_exact_test(only_a, only_b, p):
    for terms in ([1.0] * only_a + [-1.0] * only_b + [0.0] * 100, [-1.0] * only_a + [1.0] * only_b):
        found = sign_flip_p_values(np.array(terms)[:, None], 40_000, 0)[0]
        exact = only_a + only_b <= 12
        assert found == pytest.approx(p, abs=5e-5 if exact else 0.01)


def test_sign_flips_of_few_clusters_are_all_tried_and_of_many_drawn():
    rng = np.random.default_rng(0)
    terms_CF = rng.normal(size=(10, 3))
    signs = np.array(list(itertools.product([-1, 1], repeat=10)))
    expected = (np.abs(signs @ terms_CF) >= np.abs(terms_CF.sum(0)) - 1e-12).mean(0)
    np.testing.assert_allclose(sign_flip_p_values(terms_CF, 100, 0), expected)
    np.testing.assert_allclose(sign_flip_p_values(np.vstack([terms_CF, np.zeros((50, 3))]), 100, 0), expected)
    many = rng.normal(1.0, 0.5, size=(40, 1))
    assert sign_flip_p_values(many, 999, 0)[0] == 1 / 1000


def test_sign_flips_of_equal_clusters_reject_as_often_as_said_however_unequal_they_are():
    rng, rejected = np.random.default_rng(0), 0
    size_C = np.array([1] * 10 + [10] * 8 + [60] * 4)
    for world in range(600):
        rejected += sign_flip_p_values((rng.normal(size=22) * size_C)[:, None], 400, world)[0] <= 0.05
    assert 0.03 <= rejected / 600 <= 0.065


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num", [3, 40])
def test_a_term_that_is_no_number_is_refused_rather_than_called_significant(bad, num):
    terms_CF = np.ones((num, 2))
    terms_CF[1, 0] = bad
    with pytest.raises(ValueError, match="expected finite terms, got 1 that"):
        sign_flip_p_values(terms_CF, 100, 0)
