"""Agreement against published examples and against the definitions, pair by pair."""

import itertools

import numpy as np
import pytest

from sarm.contracts.figures import plain_values
from sarm.interpret.agreement import BetweenJudges, agreement, gwet_ac2, jaccard, krippendorff_alpha, quadratic_kappa

NAN = float("nan")
# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: four observers, twelve units.
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)


def brute_alpha(ratings: np.ndarray) -> float:
    """Observed over expected disagreement, over all ordered pairs of values."""
    units = [[int(v) for v in column if not np.isnan(v)] for column in ratings.T]
    units = [unit for unit in units if len(unit) > 1]
    values = [v for unit in units for v in unit]

    def distance(c: int, k: int) -> float:
        c, k = min(c, k), max(c, k)
        return (sum(c <= v <= k for v in values) - (values.count(c) + values.count(k)) / 2) ** 2

    observed = sum(distance(a, b) / (len(u) - 1) for u in units for a, b in itertools.permutations(u, 2)) / len(values)
    expected = sum(distance(a, b) for a, b in itertools.permutations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


def brute_ac2(ratings: np.ndarray, levels: int = 5) -> float:
    """Gwet's formula by loops over items and pairs of raters."""
    weight = {(k, m): 1 - (k - m) ** 2 / (levels - 1) ** 2 for k in range(1, 6) for m in range(1, 6)}
    items = [[int(v) for v in column if not np.isnan(v)] for column in ratings.T]
    p_a = np.mean([np.mean([weight[a, b] for a, b in itertools.permutations(i, 2)]) for i in items if len(i) > 1])
    pi = [np.mean([i.count(k) / len(i) for i in items if i]) for k in range(1, levels + 1)]
    p_e = sum(weight.values()) / (levels * (levels - 1)) * sum(p * (1 - p) for p in pi)
    return (p_a - p_e) / (1 - p_e)


def test_published_values():
    assert krippendorff_alpha(PUBLISHED) == pytest.approx(0.815, abs=5e-4)
    # Gwet's AC1 of the same data, as his own software gives it.
    assert gwet_ac2(PUBLISHED, weights_QQ=np.eye(5)) == pytest.approx(0.77544, abs=5e-6)
    a, b = np.array([5.0, 5, 1, 1, 3]), np.array([5.0, 4, 1, 1, 3])
    # By hand: mean squared difference 1/5, by chance 12.2 + 10.4 - 2 * 3 * 2.8. Levels that nobody used still lie between others.
    assert quadratic_kappa(a, b) == pytest.approx(1 - 0.2 / 5.8)
    assert krippendorff_alpha(np.array([a, b, [5, 5, 1, 2, 3]])) == pytest.approx(0.9349, abs=5e-5)


def test_both_equal_their_definitions_with_missing_ratings():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ratings = rng.integers(1, 6, size=(rng.integers(2, 5), 12)).astype(float)
        ratings[rng.random(ratings.shape) < 0.25] = NAN
        assert krippendorff_alpha(ratings) == pytest.approx(brute_alpha(ratings))
        assert gwet_ac2(ratings) == pytest.approx(brute_ac2(ratings))


def test_what_is_undefined_is_none_and_skew_does_not_fool_ac2():
    constant = np.full((3, 8), 5.0)
    assert krippendorff_alpha(constant) is None
    assert gwet_ac2(constant) == 1.0
    assert quadratic_kappa(constant[0], constant[1]) is None
    assert krippendorff_alpha(np.array([[1.0, NAN], [NAN, 2.0]])) is None
    assert gwet_ac2(np.array([[1.0, NAN], [NAN, 2.0]])) is None
    assert jaccard(set(), set()) is None
    skewed = np.full((2, 50), 5.0)
    skewed[0, 0] = skewed[1, 1] = 4.0
    assert krippendorff_alpha(skewed) < 0.1
    assert gwet_ac2(skewed) > 0.95


def rows(**judges: list[list[int | None]]) -> list[dict]:
    return [
        {"latent": latent, "rubric": "safety", "judge": judge, "repeat": repeat, "rating": rating}
        for judge, repeats in judges.items()
        for repeat, ratings in enumerate(repeats)
        for latent, rating in enumerate(ratings)
    ]


def test_the_selected_set_over_judges_and_thresholds():
    found = plain_values(agreement(rows(a=[[5, 4, 3, 1], [5, 4, 3, 1]], b=[[5, 5, None, 1]]), "safety"))
    assert found["num_items"] == 4
    assert found["answered"] == {"a": 1.0, "b": 0.75}
    assert found["selected"]["num"] == {"a": {"3": 3, "4": 2, "5": 1}, "b": {"3": 2, "4": 2, "5": 2}}
    assert found["selected"]["shared_by_judges"] == {"3": {"a / b": 2 / 3}, "4": {"a / b": 1.0}, "5": {"a / b": 0.5}}
    assert found["selected"]["shared_by_thresholds"]["a"] == {"3 / 4": 2 / 3, "4 / 5": 0.5}
    assert found["within"]["a"] == {"alpha": 1.0, "ac2": 1.0}
    assert "b" not in found["within"]
    # A missing rating is missing: not a low one, and not a safety latent either.
    assert found["between"]["alpha"] == pytest.approx(brute_alpha(np.array([[5, 4, 3, 1], [5, 5, NAN, 1.0]])))


def test_one_judge_and_no_rows_have_no_agreement():
    assert agreement(rows(a=[[1, 2]]), "safety").between == BetweenJudges(None, None, {})
    assert agreement([], "safety").num_items == 0
