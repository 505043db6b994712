"""The estimate by which a queue is admitted: near the truth soon, and not misled by what comes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.serve.speed import Speed


def test_a_cold_first_batch_and_a_small_second_do_not_refuse_a_burst() -> None:
    """A model that reads 1,400 tokens a second; its first answer took a second and a half."""
    speed = Speed(1024)
    speed.add(30, 1.5)
    speed.add(30, 0.09)
    assert 64 * 135 / speed.tokens_per_second < 100


@pytest.mark.parametrize(("full", "truth"), [(1024, 5.0), (1024, 80.0), (1024, 1400.0), (16_384, 60_000.0)])
def test_full_batches_are_believed_after_a_few(full: int, truth: float) -> None:
    speed = Speed(full)
    for _ in range(5):
        speed.add(full, full / truth)
    # What was assumed first weighs 50 tokens of thousands.
    assert speed.tokens_per_second == pytest.approx(truth, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0.001, 100.0)), min_size=2, max_size=60))
def test_the_estimate_lies_within_what_was_seen(batches: list[tuple[int, float]]) -> None:
    speed = Speed(1024)
    for tokens, seconds in batches:
        speed.add(tokens, seconds)
    rates = [500.0, *(tokens / seconds for tokens, seconds in batches[1:])]
    assert min(rates) * (1 - 1e-9) <= speed.tokens_per_second <= max(rates) * (1 + 1e-9)


def test_a_server_that_slows_down_is_noticed() -> None:
    speed = Speed(1024)
    for _ in range(50):
        speed.add(1024, 1.0)
    for _ in range(10):
        speed.add(1024, 4.0)
    assert speed.tokens_per_second < 1.2 * 256
