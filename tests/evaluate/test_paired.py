import numpy as np
import pytest

from sarm.evaluate.benchmarks.paired import SubsetDifference, compare, holm
from sarm.evaluate.benchmarks.pairs import PAIRS
from sarm.evaluate.benchmarks.reward_bench import REWARD_BENCH, SECTIONS
from sarm.evaluate.benchmarks.reward_bench_2 import REWARD_BENCH_2
from sarm.evaluate.benchmarks.rm_bench import RM_BENCH
from sarm.evaluate.benchmarks.rows import ScoredRow
from sarm.evaluate.intervals import wilson_interval
from sarm.settings.checks import UserError


def row(subset: str, row_id: object, scores, num_correct: int = 1, cluster: str = "") -> ScoredRow:
    zeros = np.zeros(len(scores))
    return ScoredRow(
        subset, str(row_id), cluster or f"{subset}{row_id}", num_correct, np.array(scores, float), zeros, zeros
    )


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_a_model_does_not_differ_from_itself():
    rng = np.random.default_rng(0)
    rows = [row("Math", i, rng.normal(size=4)) for i in range(50)]
    found = compare(REWARD_BENCH_2, rows, rows, 200, 0)
    overall = found.figures["overall"]
    low, high = overall.difference_ci95
    assert overall.difference == 0
    assert low < 0 < high
    assert overall.p_swap == 1
    assert found.subsets["Math"] == SubsetDifference(
        num_rows=50, num_prompts=50, only_a=0, only_b=0, p_swap=1.0, p_holm=1.0
    )


def test_pairing_finds_what_two_separate_intervals_hide():
    rng = np.random.default_rng(1)
    weak = [row("", i, [float(rng.random() < 0.6), 0.5]) for i in range(300)]
    fixed = {i for i, r in enumerate(weak) if r.scores[0] == 0 and rng.random() < 0.1}
    strong = [row("", i, [1.0, 0.5]) if i in fixed else r for i, r in enumerate(weak)]
    found = compare(PAIRS, strong, weak, 2000, 0)
    assert found.figures["overall"].difference == pytest.approx(len(fixed) / 300)
    assert found.figures["overall"].difference_ci95[0] > 0
    assert found.subsets[""].p_swap == found.figures["overall"].p_swap < 0.01


def test_one_prompt_that_differs_is_no_evidence():
    weak = [row("", i, [float(i % 2), 0.5]) for i in range(30)]
    strong = [row("", 0, [1.0, 0.5]), *weak[1:]]
    overall = compare(PAIRS, strong, weak, 500, 0).figures["overall"]
    assert overall.num_differing_prompts == 1
    assert overall.difference_ci95[0] < 0 < overall.difference
    assert overall.p_swap == 1


def test_the_interval_of_a_difference_holds_the_truth_19_times_in_20():
    held = 0
    for world in range(400):
        rng = np.random.default_rng(world)
        skill = rng.normal(size=150)
        a, b = ([row("", i, [s + d + rng.normal(), 0.0]) for i, s in enumerate(skill)] for d in (0.5, 0.5))
        low, high = compare(PAIRS, a, b, 400, world).figures["overall"].difference_ci95
        held += low <= 0 <= high
    assert 0.93 <= held / 400 <= 0.97


def test_equal_models_differ_in_5_of_100_where_pairs_of_a_prompt_share_answers():
    """Tests that take pairs as independent call two models of one law different in a quarter of such comparisons."""
    claimed = {"subset": 0, "figure": 0}
    for world in range(300):
        rng = np.random.default_rng(world)
        both: list[list[ScoredRow]] = [[], []]
        for prompt, size in enumerate([1] * 7 + [10] * 9 + [49, 58, 60]):
            shared = rng.normal(size=2)
            for pair in range(size):
                noise = rng.normal(size=2)
                for model in range(2):
                    score = 1.0 + shared[model] + 0.6 * noise[model]
                    both[model].append(row("", f"{prompt}-{pair}", [score, 0.0], cluster=str(prompt)))
        found = compare(PAIRS, *both, 200, world)
        claimed["subset"] += found.subsets[""].p_holm <= 0.05
        claimed["figure"] += found.figures["overall"].p_swap <= 0.05
    assert claimed["subset"] / 300 <= 0.07
    assert claimed["figure"] / 300 <= 0.07


def test_rows_that_are_equal_in_a_section_bound_its_difference_by_their_own_number():
    rng = np.random.default_rng(0)
    a, b = ([row(s, i, [1, 0] if section == "Chat" else rng.normal(size=2)) for section, subsets in SECTIONS.items() for s in subsets for i in range(12)] for _ in range(2))  # fmt: skip
    found = compare(REWARD_BENCH, a, b, 200, 0).figures
    alike = 12 * 358**2 / (100**2 + 95**2 + 95**2 + 28**2 + 40**2)
    unseen = wilson_interval(0, alike).high
    assert found["Chat"].difference_ci95 == pytest.approx([-unseen, unseen])
    assert found["Chat"].p_swap == 1
    assert found["Safety"].difference_ci95[1] - found["Safety"].difference_ci95[0] > 0.1


@pytest.mark.parametrize(("num", "is_claimed"), [(1, False), (2, False), (5, False), (6, True), (12, True)])
def test_prompts_that_one_model_alone_wins_leave_zero_out_from_six_on(num, is_claimed):
    """Interval and test agree: two-sided, 2^(1 - 5) of sign flips are as extreme as five on one side, which is over 5 %."""
    a, b = ([row("Safety", i, scores) for i in range(num)] for scores in ([1, 0], [0, 1]))
    for found in compare(REWARD_BENCH_2, a, b, 100, 0).figures.values():
        assert (found.difference_ci95[0] > 0) == is_claimed == (found.p_swap <= 0.05)
    rng = np.random.default_rng(0)
    maths = [row("Math", i, rng.normal(size=2)) for i in range(300)]
    for others in (maths, [row("Math", i, rng.normal(size=2) + r.scores) for i, r in enumerate(maths)]):
        overall = compare(REWARD_BENCH_2, a + maths, b + others, 100, 0).figures["overall"]
        assert overall.difference > 0.4
        assert (overall.difference_ci95[0] > 0) == is_claimed


def test_rows_of_one_run_only_are_counted_and_not_compared():
    a, b = [row("", i, [1, 0]) for i in range(6)], [row("", i, [0, 1]) for i in range(4, 8)]
    found = compare(PAIRS, a, b, 100, 0)
    assert (found.num_rows, found.num_unmatched) == (2, 6)
    assert compare(PAIRS, a[:2], b, 100, 0).figures == {}


def test_rows_whose_prompts_have_other_ids_in_the_other_run_are_refused():
    """Clusters in another order would subtract one prompt's rows from another's, and give a p-value of nothing."""
    a = [row("Math", i, [1, 0], cluster=f"{i}") for i in range(4)]
    b = [row("Math", i, [1, 0], cluster=f"{9 - i}") for i in range(4)]
    with pytest.raises(UserError, match="row Math 0 is of prompt 0 in A and of 9 in B"):
        compare(REWARD_BENCH_2, a, b, 100, 0)


def test_a_row_of_three_styles_is_right_if_most_comparisons_are_won():
    assert RM_BENCH.is_right(row("chat", 0, [4, 5, 6, 1, 2, 4.5], 3))
    assert not RM_BENCH.is_right(row("chat", 0, [1, 2, 3, 1, 2, 3], 3))
    assert not REWARD_BENCH_2.is_right(row("Ties", "tied:0", [3, 1, 2], 2))
    assert not REWARD_BENCH_2.is_right(row("Math", 0, [1, 1, 0, 0]))
