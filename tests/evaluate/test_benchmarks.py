"""The scoring rules against vectors of the official code, hand numbers and brute force."""

import itertools

import numpy as np
import pytest

from sarm.evaluate.benchmarks.best_of_n import BEST_OF_N, best_of
from sarm.evaluate.benchmarks.pairs import PAIRS
from sarm.evaluate.benchmarks.reward_bench import REWARD_BENCH, SECTIONS
from sarm.evaluate.benchmarks.reward_bench_2 import REWARD_BENCH_2, best_of_n_credit, ties_score_0_1_4
from sarm.evaluate.benchmarks.rm_bench import RM_BENCH
from sarm.evaluate.benchmarks.rows import ScoredRow


def row(subset: str, row_id: object, scores: list[float], num_correct: int = 1) -> ScoredRow:
    zeros = np.zeros(len(scores))
    return ScoredRow(subset, str(row_id), str(row_id), num_correct, np.array(scores, float), zeros, zeros)


@pytest.mark.parametrize(
    ("scores", "credit"),
    [([2, 1, 0, -1], 1), ([1, 2, 0, 0], 0), ([1, 1, 0, 0], 0.5), ([1, 1, 1, 1], 0.25), ([0, 0, 0, 1], 0)],
)
def test_a_best_of_n_row_shares_its_point_at_a_tie(scores, credit):
    assert best_of_n_credit(np.array(scores, float)) == credit


REF, TIED = ([0.0, 1], 1), ([0, 0.5, 1], 2)
PERFECT = {"ref:0": ([5, 0, 0], 1), "tied:0": ([3, 2.9, 0], 2)}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (PERFECT, 1.01),
        ({"ref:0": ([5, 0], 1), "tied:0": ([3, 3, 0], 2)}, 1.01),
        ({"ref:0": ([5, 0], 1), "tied:0": ([5, 1, 0.5], 2)}, 0.5929609439606338),
        ({"ref:0": ([1, 0.9], 1), "tied:0": ([3, 2, 0.5], 2)}, 0.7928370212980098),
        ({"ref:0": REF, "tied:0": TIED}, -0.009950547536867305),
        ({**PERFECT, "ref:1": REF, "tied:1": TIED}, 0.5000247262315664),
        ({"ref:0": ([1, 1], 1), "tied:0": ([2, 2, 2], 2)}, 0.0),
    ],
    ids=["perfect", "spread 0", "margin", "hard", "negative", "two prompts", "all equal"],
)
def test_ties_give_what_the_official_code_gives(case, expected):
    rows = [row("Ties", key, *value) for key, value in case.items()]
    assert REWARD_BENCH_2.figures(rows) == {"Ties": expected, "overall": expected}


def test_ties_without_partners_are_left_out_of_the_overall():
    figures = REWARD_BENCH_2.figures([row("Ties", "ref:0", [5, 0]), row("Math", 1, [1, 0, 0, 0])])
    assert "Ties" not in figures
    assert figures["overall"] == 1


def test_the_packages_ties_rules_differ_where_the_spread_is_zero():
    rows = [row("Ties", "ref:0", [5, 0]), row("Ties", "tied:0", [3, 3, 0], 2)]
    assert ties_score_0_1_4(rows) == 1.0


def test_the_overall_of_reward_bench_2_is_the_plain_mean_of_its_subsets():
    rows = [row("Math", i, [1, 0, 0, 0]) for i in range(9)] + [row("Focus", 0, [0, 1, 0, 0])]
    assert REWARD_BENCH_2.figures(rows) == {"Math": 1, "Focus": 0, "overall": 0.5}


CONCISE, FANCY = [1, 2, 3], [4, 5, 6]


@pytest.mark.parametrize(
    ("chosen", "rejected", "levels"),
    [
        ([1, 2, 3], [1, 2, 3], (0, 0, 1)),
        ([4, 5, 6], [1, 2, 3], (1, 1, 1)),
        ([1.1, 2.1, 3.1], [1, 2, 3], (0, 1, 1)),
        ([0, 0, 0], [0, 0, 0], (0, 0, 0)),
    ],
)
def test_rm_bench_levels_are_the_triangles_of_its_matrix(chosen, rejected, levels):
    figures = RM_BENCH.figures([row("chat", 0, [*chosen, *rejected], 3)])
    assert tuple(figures[name] for name in ("hard", "normal", "easy")) == levels


def test_rm_bench_pools_the_rows_of_safety_and_shows_its_halves():
    rows = [
        row("chat", 0, [4, 5, 6, 1, 2, 3], 3),
        row("math", 0, [1.1, 2.1, 3.1, 1, 2, 3], 3),
        row("code", 0, [1, 2, 3, 4, 5, 6], 3),
        *(row("safety-refuse", i, [4, 5, 6, 1, 2, 3], 3) for i in range(3)),
        row("safety-response", 0, [1, 2, 3, 4, 5, 6], 3),
    ]
    figures = RM_BENCH.figures(rows)
    expected = {"chat": 1, "math": 2 / 3, "code": 0, "safety": 0.75, "safety-refuse": 1, "safety-response": 0}
    expected |= {"hard": 0.4375, "normal": 0.6875, "easy": 0.6875, "overall": 0.6041667}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-7)


def test_rm_bench_equals_a_brute_force_reading_of_its_definition_on_random_scores():
    rng = np.random.default_rng(3)
    for _ in range(1000):
        cube = rng.integers(-2, 3, size=(rng.integers(1, 8), 6)).astype(float)
        figures = RM_BENCH.figures([row("code", i, list(scores), 3) for i, scores in enumerate(cube)])
        won = np.mean([[[s[i] > s[3 + j] for j in range(3)] for i in range(3)] for s in cube], axis=0)
        assert figures["hard"] == np.mean([won[0, 1], won[0, 2], won[1, 2]])
        assert figures["normal"] == np.mean(np.diag(won))
        assert figures["easy"] == np.mean([won[1, 0], won[2, 0], won[2, 1]])
        assert figures["overall"] == pytest.approx(won.mean(), abs=1e-12)


def test_the_sections_of_version_1_weigh_math_like_code():
    rows = [row("math-prm", 0, [1, 0]), row("hep-cpp", 0, [0, 1]), row("hep-go", 0, [0, 0])]
    figures = REWARD_BENCH.figures(rows)
    assert figures["Reasoning"] == 984 / (984 + 164 + 164)
    assert sum(SECTIONS["Reasoning"].values()) == 2 * 984
    assert figures["overall"] == figures["Reasoning"]


def test_the_best_of_k_is_the_mean_over_all_draws():
    scores, num_correct = np.array([0.3, 0.9, 0.5, 0.9, -1.0, 0.5]), 3
    for k in range(1, 7):
        draws = []
        for chosen in itertools.combinations(range(6), k):
            best = max(scores[i] for i in chosen)
            tied = [i for i in chosen if scores[i] == best]
            draws.append(np.mean([i < num_correct for i in tied]))
        assert best_of(scores, num_correct, k) == pytest.approx(np.mean(draws))


def test_own_pairs_count_half_at_an_equal_score_and_by_subset():
    rows = [row("a", 0, [1, 0]), row("a", 1, [1, 1]), row("b", 2, [0, 1])]
    assert PAIRS.figures(rows) == {"overall": 0.5, "a": 0.75, "b": 0}
    assert BEST_OF_N.figures([row("", 0, [1, 0, 2, -1], 2)])["best_of_4"] == 0
