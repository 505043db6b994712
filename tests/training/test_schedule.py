import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.training.schedule import trapezoid, warmup_cosine


@pytest.mark.parametrize(
    ("share", "factor"),
    [(0.0, 0.0), (0.025, 0.5), (0.05, 1.0), (0.5, 1.0), (0.8, 1.0), (0.9, 0.5), (0.95, 0.25), (1.0, 0.0)],
)
def test_trapezoid_matches_hand_numbers(share, factor):
    assert trapezoid(share, 0.05, 0.2) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("share", "factor"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.325, 0.853553), (0.55, 0.5), (1.0, 0.0)]
)
def test_warmup_cosine_matches_hand_numbers(share, factor):
    assert warmup_cosine(share, 0.1) == pytest.approx(factor, abs=1e-6)


def test_without_warmup_the_rate_starts_at_its_peak():
    assert trapezoid(0.0, 0.0, 0.2) == warmup_cosine(0.0, 0.0) == 1


def test_without_decay_the_rate_stays_at_its_peak():
    assert trapezoid(1.0, 0.1, 0.0) == 1


shares = st.floats(0, 1)


@given(share=shares, step=st.floats(0, 1e-3), warmup=st.floats(0.05, 0.5), decay=st.floats(0.05, 0.5))
def test_neither_schedule_jumps_or_leaves_0_to_1(share, step, warmup, decay):
    after = min(1.0, share + step)
    for schedule in (lambda s: trapezoid(s, warmup, decay), lambda s: warmup_cosine(s, warmup)):
        assert 0 <= schedule(share) <= 1
        # Its steepest slope is one over the shorter ramp, or the half cosine's pi / 2 over at least half of the way.
        assert abs(schedule(after) - schedule(share)) <= 4 * (after - share) / min(warmup, decay) + 1e-9


@given(share=shares, later=shares, warmup=st.floats(0, 0.9))
def test_the_cosine_only_falls_after_its_warmup(share, later, warmup):
    share, later = sorted((max(share, warmup), max(later, warmup)))
    assert warmup_cosine(later, warmup) <= warmup_cosine(share, warmup) + 1e-12
