import numpy as np
import pyarrow as pa
import pytest

from sarm.contracts.tables import PAIR_SCORES_TABLE
from sarm.evaluate.intervals import wilson_interval
from sarm.evaluate.pairs import accuracy_difference, length_baseline, measure_pairs, random_baseline
from sarm.settings.checks import UserError


def scores_of(chosen, rejected, prompts=None, subsets=None, tokens=None, ids=None):
    n = len(chosen)
    tokens = tokens or [(10, 10)] * n
    rows = [
        {
            "pair_id": (ids or [f"pair{i}" for i in range(n)])[i],
            "prompt_id": (prompts or [f"prompt{i}" for i in range(n)])[i],
            "subset": (subsets or [None] * n)[i],
            "chosen_reward": chosen[i],
            "rejected_reward": rejected[i],
            "chosen_tokens": tokens[i][0],
            "rejected_tokens": tokens[i][1],
        }
        for i in range(n)
    ]
    return pa.Table.from_pylist(rows, schema=PAIR_SCORES_TABLE)


def random_scores(n, seed, gain=0.5, shuffle=False):
    rng = np.random.default_rng(seed)
    chosen, rejected = (rng.normal(gain, 1, n)).tolist(), rng.normal(0, 1, n).tolist()
    scores = scores_of(chosen, rejected, prompts=[f"prompt{i // 3}" for i in range(n)])
    return scores.take(rng.permutation(n)) if shuffle else scores


def test_measures_match_hand_numbers():
    scores = scores_of([2.0, 0.5, -1.0, 3.0], [0.0, 0.0, 0.0, 3.0], prompts=["a", "a", "b", "c"])
    measures = measure_pairs(scores)
    assert (measures.num_pairs, measures.num_prompts, measures.ties) == (4, 3, 1)
    assert measures.accuracy == pytest.approx(2.5 / 4)
    assert measures.mean_margin == pytest.approx(1.5 / 4)
    assert measures.calibration.nll == pytest.approx((3 * 0.638089 + np.log(2)) / 4, abs=1e-6)
    assert measures.chosen_reward_mean == pytest.approx(4.5 / 4)
    assert measures.rejected_reward_std == pytest.approx(np.std([0, 0, 0, 3]))
    low, high = measures.accuracy_ci95
    assert low < measures.accuracy < high


def test_rewards_that_are_not_finite_are_counted_and_left_out():
    scores = scores_of([1.0, float("nan"), float("inf"), 1.0], [0.0, 0.0, float("inf"), 2.0])
    measures = measure_pairs(scores)
    assert (measures.num_nonfinite, measures.num_pairs, measures.accuracy) == (2, 2, 0.5)


def test_a_subset_without_pairs_has_a_note_and_no_accuracy():
    scores = scores_of([1.0, float("nan")], [0.0, 0.0], subsets=["good", "bad"])
    subsets = measure_pairs(scores).by_subset
    assert subsets["good"].accuracy == 1
    assert subsets["bad"].num_nonfinite == 1
    assert subsets["bad"].note
    assert subsets["bad"].accuracy is None


def test_an_empty_table_has_a_note_everywhere():
    empty = scores_of([], [])
    measured = (measure_pairs(empty), length_baseline(empty)["shorter"], random_baseline(empty, 0))
    assert all(m.note and m.accuracy is None for m in measured)


def test_pairs_without_a_subset_count_overall_only():
    scores = scores_of([1.0, 0.0], [0.0, 1.0], subsets=["x", None])
    measures = measure_pairs(scores)
    assert measures.num_pairs == 2
    assert list(measures.by_subset) == ["x"]


def test_a_perfect_score_still_has_an_interval():
    assert measure_pairs(scores_of([1.0] * 5, [0.0] * 5)).accuracy_ci95 == wilson_interval(5, 5)


def test_length_rules_mirror_each_other_and_give_half_to_equal_lengths():
    scores = scores_of([0.0] * 4, [0.0] * 4, tokens=[(5, 9), (5, 6), (7, 7), (9, 5)])
    rules = length_baseline(scores)
    assert rules["shorter"].accuracy == 2.5 / 4
    assert rules["longer"].accuracy == 1.5 / 4
    assert rules["shorter"].ties == 1


def test_random_rewards_score_near_chance_and_ignore_row_order():
    scores = random_scores(1500, 0)
    baseline = random_baseline(scores, 3)
    low, high = baseline.accuracy_ci95
    assert low < 0.5 < high
    shuffled = scores.take(np.random.default_rng(1).permutation(1500))
    assert random_baseline(shuffled, 3).accuracy == baseline.accuracy
    assert random_baseline(scores, 4).accuracy != baseline.accuracy


def test_difference_joins_by_pair_and_counts_what_has_no_partner():
    a = scores_of([1.0, 1.0, 0.0], [0.0, 0.0, 1.0], ids=["p", "q", "only_a"])
    b = scores_of([0.0, 1.0, 1.0], [1.0, 0.0, 0.0], ids=["q", "p", "only_b"])
    result = accuracy_difference(a, b)
    assert (result.num_pairs, result.num_unmatched, result.difference) == (2, 2, 0.5)


def test_paired_difference_is_narrower_than_two_separate_intervals():
    a = random_scores(600, 0)
    noise = np.random.default_rng(9).normal(0, 0.1, 600)
    b = a.set_column(3, PAIR_SCORES_TABLE.field(3), pa.array(a["chosen_reward"].to_numpy() + noise, pa.float32()))
    low, high = accuracy_difference(a, b).difference_ci95
    own_low, own_high = measure_pairs(a).accuracy_ci95
    assert low < 0 < high
    assert high - low < (own_high - own_low) / 2


def test_difference_of_equal_models_is_zero_within_a_symmetric_interval():
    a = random_scores(90, 0)
    result = accuracy_difference(a, random_scores(90, 0))
    low, high = result.difference_ci95
    assert result.difference == 0
    assert low == -high < 0


def test_difference_refuses_a_pair_that_stands_twice():
    twice = scores_of([1.0, 1.0], [0.0, 0.0], ids=["p", "p"])
    with pytest.raises(UserError, match="twice"):
        accuracy_difference(twice, scores_of([1.0], [0.0]))


def test_difference_without_common_finite_pairs_says_so():
    result = accuracy_difference(scores_of([1.0], [0.0], ids=["a"]), scores_of([1.0], [0.0], ids=["b"]))
    assert result.num_pairs == 0
    assert result.note
