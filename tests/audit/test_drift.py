"""The exact parts of a shift of the mean reward, and the figures of a step."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.audit.drift_streams import answer_of

from sarm.audit.drift import Answer, decomposed, signals_of, sums_of, together


def codes(rng: np.random.Generator, num: int, num_latents: int) -> np.ndarray:
    fires = rng.random((num, num_latents)) < rng.random(num_latents)
    return (fires * rng.normal(size=(num, num_latents)) * 10 ** rng.uniform(-2, 2)).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), first=st.integers(1, 40), second=st.integers(1, 40), num_latents=st.integers(1, 30))
def test_the_parts_sum_to_the_shift_of_the_mean_reward(seed, first, second, num_latents):
    rng = np.random.default_rng(seed)
    before, after = codes(rng, first, num_latents), codes(rng, second, num_latents)
    answers = [[answer_of(row) for row in rows] for rows in (before, after)]
    found = decomposed(*map(sums_of, answers))
    shift = np.mean([one.reward for one in answers[1]]) - np.mean([one.reward for one in answers[0]])
    assert found.shift.sum() == pytest.approx(shift, abs=1e-6)
    assert (found.rate + found.strength).sum() == pytest.approx(shift, abs=1e-6)
    dense = after.astype(np.float64).mean(0) - before.astype(np.float64).mean(0)
    assert found.shift == pytest.approx(dense[found.latents], abs=1e-6)


def test_rate_is_firing_more_often_and_strength_is_adding_more_where_it_fires():
    before = sums_of([answer_of(np.array(row)) for row in ([2.0, 2.0, 0.0], [0.0, 2.0, 0.0])])
    after = sums_of([answer_of(np.array(row)) for row in ([2.0, 5.0, 4.0], [2.0, 5.0, 0.0])])
    found = decomposed(before, after)
    assert found.latents.tolist() == [0, 1, 2]
    assert found.rate.tolist() == [1.0, 0.0, 2.0]
    assert found.strength.tolist() == [0.0, 3.0, 0.0]
    with pytest.raises(ValueError, match="two sets"):
        decomposed(before, sums_of([]))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_sums_of_parts_are_sums_of_the_whole(seed, sizes):
    rng = np.random.default_rng(seed)
    rows = [answer_of(row) for row in codes(rng, sum(sizes), 12)]
    ends = np.cumsum([0, *sizes])
    whole = sums_of(rows)
    found = together(sums_of(rows[a:b]) for a, b in itertools.pairwise(ends))
    assert (found.num, found.latents.tolist(), found.counts.tolist()) == (whole.num, whole.latents.tolist(), whole.counts.tolist())  # fmt: skip
    assert found.totals == pytest.approx(whole.totals)


def answer(reward: float, tokens: int, prompt: str, latent: int = 0, **flags) -> Answer:
    return Answer(np.array([latent]), np.array([float(reward)]), prompt, tokens, **flags)


def test_length_and_spread_are_looked_at_within_prompts():
    # Over prompts longer answers have higher rewards, within each prompt lower ones.
    answers = [answer(1, 10, "a"), answer(0, 20, "a"), answer(9, 100, "b"), answer(8, 110, "b"), answer(5, 5, "alone")]
    found = signals_of(answers, None)
    assert found["length_correlation"] == pytest.approx(-1)
    assert found["spread"] == pytest.approx(0.5)
    assert found["flat_groups"] == 0
    assert found["reward"] == pytest.approx(23 / 5)
    flat = signals_of([answer(1, 10, "a"), answer(1, 20, "a")], None)
    assert flat["flat_groups"] == 1
    assert "length_correlation" not in flat, "rewards that are equal go with nothing"
    assert not {"spread", "flat_groups", "length_correlation"} & signals_of([answer(1, 10, "a")], None).keys()


def test_rates_and_what_new_latents_pay():
    answers = [
        answer(2, 1, "a", latent=7, is_truncated=True, unexplained=0.5),
        answer(1, 1, "b", latent=3, is_injected=True),
        answer(1, 1, "c", latent=3, is_truncated=True),
        answer(1, 1, "d", latent=3),
    ]
    found = signals_of(answers, np.arange(8) == 7)
    assert (found["truncated"], found["injected"], found["cut"]) == (0.5, 0.25, 0)
    assert (found["novel"], found["unexplained"]) == (0.5, 0.5)
    assert not {"novel", "unexplained"} & signals_of(answers[3:], None).keys(), "what is not known is not said"
    with pytest.raises(ValueError, match="answers"):
        signals_of([], None)
