"""Intervals: what is resampled, what is recomputed inside, and how often they hold the truth."""

import numpy as np
import pytest
from sarm.evaluate.resampling import Sums, interval, intervals, resample

from sarm.data.statistics import wilson_interval
from sarm.evaluate.best_of_n import PAIRS
from sarm.evaluate.reward_bench_2 import REWARD_BENCH_2
from sarm.evaluate.rm_bench import RM_BENCH
from sarm.evaluate.rows import ScoredRow


def row(subset: str, row_id: object, scores, num_correct: int = 1, cluster: str = "") -> ScoredRow:
    zeros = np.zeros(len(scores))
    return ScoredRow(subset, str(row_id), cluster or f"{subset}{row_id}", num_correct, np.array(scores, float), zeros, zeros)  # fmt: skip


def random_ties(rng: np.random.Generator, num: int, shift: float = 1.5) -> list[ScoredRow]:
    rows = []
    for i in range(num):
        rows.append(row("Ties", f"ref:{i}", rng.normal([shift, 0, 0, 0])))
        rows.append(row("Ties", f"tied:{i}", rng.normal([shift] * 3 + [0] * 4), 3))
    return rows


def test_a_resample_of_ties_is_the_score_of_the_drawn_prompts():
    rows = random_ties(np.random.default_rng(0), 12)
    sums = Sums([REWARD_BENCH_2.observe(rows)])
    counts = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), size=20).astype(float)
    fast = REWARD_BENCH_2.combine(sums.means(counts, 0))["Ties"]
    names = sorted({f"Ties:{i}" for i in range(12)})
    for drawn, value in zip(counts, fast, strict=True):
        copies = []
        for name, times in zip(names, drawn, strict=True):
            number = int(name.split(":")[1])
            for copy in range(int(times)):
                new = 100 * number + copy
                copies += [
                    r._replace(row_id=f"{r.row_id.split(':')[0]}:{new}") for r in rows[2 * number : 2 * number + 2]
                ]
        assert value == pytest.approx(REWARD_BENCH_2.figures(copies)["Ties"], abs=1e-12)


def test_a_resample_of_rm_bench_is_the_score_of_the_drawn_rows():
    rng = np.random.default_rng(2)
    rows = [row(s, i, rng.normal(size=6), 3) for s in ("chat", "safety-refuse", "safety-response") for i in range(7)]
    sums = Sums([RM_BENCH.observe(rows)])
    names = sorted(r.cluster for r in rows)
    counts = rng.integers(1, 4, size=(10, len(names))).astype(float)
    fast = RM_BENCH.combine(sums.means(counts, 0))
    by_cluster = {r.cluster: r for r in rows}
    for i, drawn in enumerate(counts):
        copies = [by_cluster[name] for name, times in zip(names, drawn, strict=True) for _ in range(int(times))]
        slow = RM_BENCH.figures(copies)
        assert {name: fast[name][i] for name in slow} == pytest.approx(slow, abs=1e-12)


def test_subsets_keep_their_size_in_every_resample():
    rows = [row(s, i, [i % 2, 0.5]) for s, n in (("a", 40), ("b", 7)) for i in range(n)]
    sums = Sums([PAIRS.observe(rows)])
    sizes = []
    resample(sums, lambda means: sizes.append(len(means[0]["overall"])) or means[0], 50, 0)
    assert sorted(len(stratum) for stratum in sums.strata) == [7, 40]
    assert sum(sizes) == 50 + 47, "the resamples, and each prompt left out once"


def test_rows_of_one_prompt_widen_the_interval():
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.6
    alone = [row("", f"{p}-{i}", [float(right[p]), 0.5]) for p in range(40) for i in range(10)]
    together = [r._replace(cluster=r.row_id.split("-")[0]) for r in alone]
    width = [np.ptp(intervals(PAIRS, rows, 2000, 0)["overall"]) for rows in (alone, together)]
    assert width[1] > 2.5 * width[0]


def test_all_right_takes_wilsons_interval():
    rows = [row("", i, [1, 0]) for i in range(30)]
    assert intervals(PAIRS, rows, 200, 0)["overall"] == wilson_interval(30, 30)


def test_the_same_seed_gives_the_same_interval_and_another_a_near_one():
    rows = random_ties(np.random.default_rng(0), 40)
    first, again, other = (intervals(REWARD_BENCH_2, rows, 4000, seed)["Ties"] for seed in (0, 0, 1))
    assert first == again != other
    assert first == pytest.approx(other, abs=0.02)


def test_an_undefined_figure_has_no_interval():
    assert all(np.isnan(interval(np.array([0.1, 0.2]), float("nan"), 5, 0.0)))


NUM_WORLDS, RESAMPLES = 1000, 600


def coverage(draw, truth: float, figure: str, benchmark) -> float:
    """In how many simulated worlds the 95 % interval holds the figure's true value."""
    held = 0
    for world in range(NUM_WORLDS):
        low, high = intervals(benchmark, draw(np.random.default_rng(world)), RESAMPLES, world)[figure]
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
