"""Intervals of figures: what a prompt does to each, what they take at their edge, and how often they hold the truth."""

import numpy as np
import pytest

from sarm.evaluate.benchmarks.pairs import PAIRS
from sarm.evaluate.benchmarks.reward_bench import REWARD_BENCH, SECTIONS
from sarm.evaluate.benchmarks.reward_bench_2 import REWARD_BENCH_2
from sarm.evaluate.benchmarks.rm_bench import RM_BENCH
from sarm.evaluate.benchmarks.rows import ScoredRow
from sarm.evaluate.influence import Sums, figure_intervals, gradients
from sarm.evaluate.intervals import effective_wilson, share_interval, wilson_interval


def row(subset: str, row_id: object, scores, num_correct: int = 1, cluster: str = "") -> ScoredRow:
    zeros = np.zeros(len(scores))
    return ScoredRow(subset, str(row_id), cluster or f"{subset}{row_id}", num_correct, np.array(scores, float), zeros, zeros)  # fmt: skip


def random_ties(rng: np.random.Generator, num: int, shift: float = 1.5) -> list[ScoredRow]:
    rows = []
    for i in range(num):
        rows.append(row("Ties", f"ref:{i}", rng.normal([shift, 0, 0, 0])))
        rows.append(row("Ties", f"tied:{i}", rng.normal([shift] * 3 + [0] * 4), 3))
    return rows


def by_brute_force(benchmark, rows: list[ScoredRow], name: str, figure: str, step: float = 1e-5) -> float:
    """How far a figure moves per unit of weight of one prompt, from means that are weighted row by row."""
    observed = benchmark.observe(rows)

    def of(weight: float) -> float:
        totals: dict[str, list[float]] = {}
        for part, cluster, value in zip(observed.parts, observed.clusters, observed.values, strict=True):
            own = totals.setdefault(part, [0.0, 0.0])
            own[0] += value * (weight if cluster == name else 1.0)
            own[1] += weight if cluster == name else 1.0
        return benchmark.combine({part: total / count for part, (total, count) in totals.items()})[figure]

    return (of(1 + step) - of(1 - step)) / (2 * step)


@pytest.mark.parametrize("figure", ["Ties", "overall"])
def test_a_prompts_influence_on_ties_is_what_its_weight_does(figure):
    rows = random_ties(np.random.default_rng(0), 12) + [row("Math", i, [i % 3, 1]) for i in range(9)]
    sums = Sums(REWARD_BENCH_2.observe(rows))
    found = sums.influence(gradients(REWARD_BENCH_2, sums.parts, sums.means)[figure])
    names = sorted({*(f"Ties:{i}" for i in range(12)), *(f"Math{i}" for i in range(9))})
    np.testing.assert_allclose(found, [by_brute_force(REWARD_BENCH_2, rows, n, figure) for n in names], atol=1e-8)


@pytest.mark.parametrize("figure", ["overall", "hard", "safety", "safety-refuse/easy"])
def test_a_prompts_influence_on_rm_bench_is_what_its_weight_does(figure):
    rng = np.random.default_rng(2)
    rows = [row(s, i, rng.normal(size=6), 3) for s in ("chat", "safety-refuse", "safety-response") for i in range(7)]
    sums = Sums(RM_BENCH.observe(rows))
    found = sums.influence(gradients(RM_BENCH, sums.parts, sums.means)[figure])
    names = sorted(r.cluster for r in rows)
    np.testing.assert_allclose(found, [by_brute_force(RM_BENCH, rows, n, figure) for n in names], atol=1e-8)


def test_a_figure_that_is_one_mean_has_the_interval_of_every_other_accuracy():
    rng = np.random.default_rng(0)
    rows = [
        row("a", f"{p}-{i}", [rng.random() < 0.8, 0.5], cluster=str(p)) for p in range(30) for i in range(1 + p % 5)
    ]
    expected = share_interval(np.array([r.scores[0] for r in rows]), np.array([r.cluster for r in rows]))
    found = figure_intervals(PAIRS, rows)
    assert found["overall"] == found["a"] == expected


def test_prompts_vary_within_their_subset_alone():
    """Subsets that differ a lot widen nothing: an overall is the mean of fixed subsets."""
    rows = [row(s, i, [i < right, 0.5]) for s, right in (("Math", 38), ("Safety", 2)) for i in range(40)]
    low, high = figure_intervals(REWARD_BENCH_2, rows)["overall"]
    variance = sum(p * (1 - p) / 39 for p in (38 / 40, 2 / 40)) / 4
    assert (low, high) == pytest.approx(effective_wilson(0.5, 0.25 / variance, 78), abs=1e-9)


def test_rows_of_one_prompt_widen_the_interval():
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.6
    alone = [row("", f"{p}-{i}", [float(right[p]), 0.5]) for p in range(40) for i in range(10)]
    together = [r._replace(cluster=r.row_id.split("-")[0]) for r in alone]
    width = [np.ptp(figure_intervals(PAIRS, rows)["overall"]) for rows in (alone, together)]
    assert width[1] > 2.5 * width[0]


def test_all_right_takes_wilsons_interval():
    rows = [row("", i, [1, 0]) for i in range(30)]
    assert figure_intervals(PAIRS, rows)["overall"] == wilson_interval(30, 30)


def test_a_figure_at_its_edge_takes_the_prompts_of_its_own_part():
    rng = np.random.default_rng(0)
    rows = [row("chat", i, rng.normal(size=6), 3) for i in range(120)]
    rows += [row("safety-refuse", i, [4, 5, 6, 1, 2, 3], 3) for i in range(10)]
    found = figure_intervals(RM_BENCH, rows)
    for figure in ("safety", "safety/hard", "safety-refuse", "safety-refuse/hard"):
        assert found[figure] == pytest.approx(wilson_interval(10, 10)), figure
    sections = [row(s, i, [1, 0] if section == "Chat" else rng.normal(size=2)) for section, subsets in SECTIONS.items() for s in subsets for i in range(12)]  # fmt: skip
    # Five subsets of 12 prompts that weigh 100, 95, 95, 28 and 40.
    alike = 12 * 358**2 / (100**2 + 95**2 + 95**2 + 28**2 + 40**2)
    assert figure_intervals(REWARD_BENCH, sections)["Chat"] == pytest.approx(wilson_interval(alike, alike))


def test_a_part_at_its_edge_keeps_its_uncertainty_in_a_composite():
    """Five Safety rows that are all right say little of Safety, however much 1,000 Math rows say of Math."""
    rows = [row("Math", i, [i < 689, 0.5]) for i in range(1000)] + [row("Safety", i, [1, 0.5]) for i in range(5)]
    found = figure_intervals(REWARD_BENCH_2, rows)
    low, high = found["overall"]
    assert low < (0.689 + found["Safety"].low) / 2 < 0.8445 < high
    assert high > 0.93
    alone = [row("Math", i, [i < 689, 0.5]) for i in range(1000)] + [row("Safety", 0, [1, 0.5])]
    assert np.ptp(figure_intervals(REWARD_BENCH_2, alone)["overall"]) > high - low
    all_right = [row("Math", i, [1, 0]) for i in range(1000)] + [row("Safety", i, [1, 0]) for i in range(5)]
    assert figure_intervals(REWARD_BENCH_2, all_right)["overall"][0] < 0.87


NUM_WORLDS = 1000


def coverage(draw, truth: float, figure: str, benchmark) -> float:
    """In how many simulated worlds the 95 % interval holds the figure's true value."""
    held = 0
    for world in range(NUM_WORLDS):
        low, high = figure_intervals(benchmark, draw(np.random.default_rng(world)))[figure]
        held += low <= truth <= high
    return held / NUM_WORLDS


@pytest.mark.parametrize("accuracy", [0.6, 0.9])
def test_the_interval_of_an_accuracy_holds_the_truth_19_times_in_20(accuracy):
    def draw(rng: np.random.Generator) -> list[ScoredRow]:
        # Prompts with up to three rows each, right or wrong together.
        rows = []
        for prompt in range(100):
            right = rng.random() < accuracy
            rows += [row("", f"{prompt}-{i}", [float(right), 0.5], cluster=str(prompt)) for i in range(1 + prompt % 3)]
        return rows

    assert 0.93 <= coverage(draw, accuracy, "overall", PAIRS) <= 0.97


def test_the_interval_of_the_ties_score_holds_the_truth_19_times_in_20():
    truth = REWARD_BENCH_2.figures(random_ties(np.random.default_rng(99), 60_000))["Ties"]
    assert 0.93 <= coverage(lambda rng: random_ties(rng, 51), truth, "Ties", REWARD_BENCH_2) <= 0.97
