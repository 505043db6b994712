import numpy as np
import pytest

from sarm.evaluate.best_of_n import PAIRS
from sarm.evaluate.paired import compare, holm, is_right, mcnemar
from sarm.evaluate.reward_bench_2 import REWARD_BENCH_2
from sarm.evaluate.rows import ScoredRow


def row(subset: str, row_id: object, scores, num_correct: int = 1) -> ScoredRow:
    zeros = np.zeros(len(scores))
    return ScoredRow(subset, str(row_id), f"{subset}{row_id}", num_correct, np.array(scores, float), zeros, zeros)


@pytest.mark.parametrize(("only_a", "only_b", "p"), [(30, 23, 0.4101), (4, 3, 1.0), (0, 0, 1.0), (6, 0, 0.03125)])
def test_mcnemar_matches_published_values(only_a, only_b, p):
    assert mcnemar(only_a, only_b) == pytest.approx(p, abs=5e-5)
    assert mcnemar(only_b, only_a) == mcnemar(only_a, only_b)


def test_holm_multiplies_the_smallest_by_their_number_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_a_model_does_not_differ_from_itself():
    rng = np.random.default_rng(0)
    rows = [row("Math", i, rng.normal(size=4)) for i in range(50)]
    found = compare(REWARD_BENCH_2, rows, rows, 200, 0)
    overall = found["figures"]["overall"]
    low, high = overall["difference_ci95"]
    assert overall["difference"] == 0
    assert low < 0 < high
    assert overall["p_bootstrap"] is None
    assert found["subsets"]["Math"] == {"num_rows": 50, "only_a": 0, "only_b": 0, "p_mcnemar": 1.0, "p_holm": 1.0}


def test_pairing_finds_what_two_separate_intervals_hide():
    rng = np.random.default_rng(1)
    weak = [row("", i, [float(rng.random() < 0.6), 0.5]) for i in range(300)]
    fixed = {i for i, r in enumerate(weak) if r.scores[0] == 0 and rng.random() < 0.1}
    strong = [row("", i, [1.0, 0.5]) if i in fixed else r for i, r in enumerate(weak)]
    found = compare(PAIRS, strong, weak, 2000, 0)
    assert found["figures"]["overall"]["difference"] == pytest.approx(len(fixed) / 300)
    assert found["figures"]["overall"]["difference_ci95"][0] > 0
    assert found["subsets"][""]["p_mcnemar"] < 0.01


def test_one_prompt_that_differs_is_no_evidence():
    weak = [row("", i, [float(i % 2), 0.5]) for i in range(30)]
    strong = [row("", 0, [1.0, 0.5]), *weak[1:]]
    overall = compare(PAIRS, strong, weak, 500, 0)["figures"]["overall"]
    assert overall["num_differing_prompts"] == 1
    assert overall["difference_ci95"][0] < 0 < overall["difference"]


def test_the_interval_of_a_difference_holds_the_truth_19_times_in_20():
    held = 0
    for world in range(400):
        rng = np.random.default_rng(world)
        skill = rng.normal(size=150)
        a, b = ([row("", i, [s + d + rng.normal(), 0.0]) for i, s in enumerate(skill)] for d in (0.5, 0.5))
        low, high = compare(PAIRS, a, b, 400, world)["figures"]["overall"]["difference_ci95"]
        held += low <= 0 <= high
    assert 0.93 <= held / 400 <= 0.97


def test_rows_of_one_run_only_are_counted_and_not_compared():
    a, b = [row("", i, [1, 0]) for i in range(6)], [row("", i, [0, 1]) for i in range(4, 8)]
    found = compare(PAIRS, a, b, 100, 0)
    assert (found["num_rows"], found["num_unmatched"]) == (2, 6)
    assert compare(PAIRS, a[:2], b, 100, 0)["figures"] == {}


def test_a_row_of_three_styles_is_right_if_most_comparisons_are_won():
    assert is_right(row("chat", 0, [4, 5, 6, 1, 2, 4.5], 3))
    assert not is_right(row("chat", 0, [1, 2, 3, 1, 2, 3], 3))
    assert not is_right(row("Ties", "tied:0", [3, 1, 2], 2))
    assert not is_right(row("Math", 0, [1, 1, 0, 0]))
