from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from sarm.contracts.tables import ITEMS_TABLE
from sarm.evaluate.benchmarks.controls import calibrated, drift, fit_temperature, length_and_style, rulers
from sarm.evaluate.benchmarks.pairs import PAIRS
from sarm.evaluate.benchmarks.probes import PROBES, edit_conversation, flips, markup_count
from sarm.evaluate.benchmarks.rows import ScoredRow
from sarm.evaluate.benchmarks.suite import measure, metrics


def row(row_id: object, scores, tokens, markup=None) -> ScoredRow:
    return ScoredRow("", str(row_id), str(row_id), 1, *(np.array(v, float) for v in (scores, tokens, markup or [0] * len(scores))))  # fmt: skip


def test_the_rulers_choose_by_length_alone():
    rows = [row(i, [0, 1], [10, 5]) for i in range(4)]
    found = rulers(PAIRS, rows, 0)
    assert (found["longest"]["overall"], found["shortest"]["overall"]) == (1, 0)


def test_a_reward_that_is_length_is_worth_nothing_at_equal_length():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 400, size=(400, 2)).astype(float)
    tokens[:, 0] += 80
    rows = [row(i, pair, pair) for i, pair in enumerate(tokens)]
    found = length_and_style(rows)
    assert found.accuracy > 0.6
    assert found.length_controlled_accuracy == pytest.approx(0.5, abs=0.1)


def test_a_reward_blind_to_length_keeps_its_accuracy_under_control():
    rng = np.random.default_rng(0)
    rows = [row(i, [float(rng.random() < 0.8), 0.5], rng.integers(20, 400, size=2)) for i in range(800)]
    found = length_and_style(rows)
    assert found.length_controlled_accuracy == pytest.approx(found.accuracy, abs=0.02)


def test_a_model_that_counts_no_tokens_gets_no_length_figures():
    """Not a longest and shortest of 0, and not an accuracy of one half at equal length."""
    rows = [row(i, [float(i % 3 > 0), 0.5], [np.nan, np.nan]) for i in range(60)]
    found, by_ruler = length_and_style(rows), rulers(PAIRS, rows, 0)
    assert found.accuracy == pytest.approx(2 / 3)
    assert [name for name, value in asdict(found).items() if value is not None] == ["accuracy", "num_prompts_spearman"]
    assert (by_ruler["longest"], by_ruler["shortest"]) == ({}, {})
    assert by_ruler["random"]["overall"] == pytest.approx(0.5, abs=0.1)


def test_a_model_that_counts_no_tokens_logs_no_length_figures():
    items = [
        {"benchmark": "pairs", "subset": "", "row_id": str(i), "variant": "", "completion": c, "correct": c == 0, "cluster": str(i),
         "completion_id": f"{i}.{c}", "num_chars": 9, "markup": 0, "score": float(-c), "num_tokens": None, "truncated": False, "score_alone": None}
        for i in range(4) for c in range(2)
    ]  # fmt: skip
    measured = measure(pa.Table.from_pylist(items, schema=ITEMS_TABLE), 0)
    assert measured["benchmarks"]["pairs"]["figures"]["overall"]["longest"] is None
    assert not [name for name in metrics(measured) if "length" in name]


def test_spearman_is_taken_within_prompts():
    # Within each prompt longer is worse; over all rows longer prompts score higher.
    rows = [row(i, [10 * i - j for j in range(4)], [10 * i + j for j in range(4)]) for i in range(5)]
    assert length_and_style(rows).mean_spearman_reward_length == pytest.approx(-1)


def test_spearman_shares_ranks_at_equal_values():
    scores, tokens = [1.0, 2, 2, 5, 0], [3.0, 3, 1, 8, 2]
    expected = spearmanr(scores, tokens).statistic
    assert length_and_style([row(0, scores, tokens)]).mean_spearman_reward_length == pytest.approx(expected)


def test_the_temperature_of_overconfident_margins_is_found_on_the_other_half():
    rng = np.random.default_rng(0)
    true = rng.uniform(-3, 3, 6000)
    won = np.where(rng.random(6000) < 1 / (1 + np.exp(-np.abs(true))), np.abs(true), -np.abs(true))
    assert fit_temperature(5 * won) == pytest.approx(5, rel=0.1)
    found = calibrated([row(i, [5 * m, 0], [1, 1]) for i, m in enumerate(won)])
    assert found.temperature == pytest.approx(5, rel=0.15)
    assert found.scaled.nll < found.raw.nll
    assert found.scaled.ece < 0.04


def test_drift_is_the_largest_move_of_a_score_taken_alone():
    blank = {"benchmark": "pairs", "subset": "", "variant": "", "correct": True, "cluster": "", "num_chars": 1, "markup": 0}  # fmt: skip
    rows = [
        {**blank, "row_id": str(i), "completion": 0, "completion_id": str(i), "score": s, "score_alone": a}
        for i, (s, a) in enumerate([(1.0, 1.0), (2.0, 2.5), (3.0, None)])
    ]
    found = drift(pa.Table.from_pylist(rows, schema=ITEMS_TABLE))
    assert (found.num_completions, found.max) == (2, 0.5)
    assert drift(pa.Table.from_pylist(rows[2:], schema=ITEMS_TABLE)) is None


TEXT = (
    "# A heading\n\nThe **quick** brown fox jumps over the lazy river bank. Then it sleeps soundly there.\n- one\n- two"
)


@pytest.mark.parametrize("probe", PROBES)
def test_an_edit_changes_the_text_keeps_its_letters_and_repeats(probe):
    prompt = [{"role": "user", "content": "Why?"}]
    long = " ".join([TEXT] * 8)
    edited = edit_conversation(probe, prompt, long)
    assert edited == edit_conversation(probe, prompt, long)
    assert edited != (prompt, long)
    before, after = (sorted(c for c in t.lower() if c.isalpha()) for t in (long, edited[1]))
    assert before == after
    assert prompt == [{"role": "user", "content": "Why?"}]


def test_markup_is_counted_and_taken_out():
    assert markup_count(TEXT) == 5
    assert markup_count(edit_conversation("markdown", [{"role": "user", "content": "q"}], TEXT)[1]) == 0


def test_flips_are_counted_over_pairs_and_joined_by_id():
    plain = [row(i, [1, 0], [1, 1]) for i in range(4)]
    edited = [row(0, [0, 1], [1, 1]), row(1, [2, 1], [1, 1]), row(9, [0, 1], [1, 1])]
    found = flips(plain, edited)
    assert (found.num_rows, found.flipped, found.accuracy_after) == (2, 0.5, 0.5)
    assert flips(plain, edited[2:]) is None
