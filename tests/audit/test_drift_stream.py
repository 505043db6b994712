"""How often a run in which nothing changes alarms, and how soon one that is hacked does, and by which name."""

import numpy as np
import pytest
from tests.audit.drift_streams import answer_of, payer, pool, steps, watched

from sarm.audit.drift import SIGNALS, sums_of
from sarm.audit.drift_stream import LEVEL, DriftStream, concentration, suspects
from sarm.audit.rank_martingales import FIRST_STEPS, RankMartingales

SEEDS = 50


def test_streams_of_2000_steps_in_which_nothing_changes_stay_silent():
    alarms = 0
    for seed in range(SEEDS):
        contributions = pool(seed, num_latents=8)
        alarms += watched(contributions, steps(contributions, seed, 2000), seed)[1] is not None
    assert alarms <= LEVEL * SEEDS


def test_ties_are_no_evidence():
    """Latents that fire in hardly any step, as most do, and one that is always the same."""
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        found = RankMartingales(40, seed)
        for _ in range(500):
            fires = np.flatnonzero(rng.random(40) < 0.02)
            found.add(np.union1d(fires, [0]), np.ones(len(np.union1d(fires, [0]))))
        assert found.evidence.max() < 40 / LEVEL


@pytest.mark.parametrize("rate", [0.6, 0.04])
@pytest.mark.parametrize("start", [40, 400])
def test_a_planted_hack_is_named_and_soon(rate, start):
    num, named, delays = 20, 0, []
    for seed in range(num):
        contributions = pool(seed)
        hacked = payer(contributions, rate)
        rows = steps(contributions, seed, start + 200, hacked, start)
        stream, alarm = watched(contributions, rows, seed, stop=lambda one: one.step >= start)
        assert alarm is not None
        named += hacked in suspects(stream)
        delays.append(alarm.step - start)
    assert named >= 0.9 * num
    assert np.median(delays) < 45


def test_a_latent_that_never_fired_before_is_found():
    contributions = pool(0)
    stream = DriftStream(200)
    for step, rows in enumerate(steps(contributions, 0, 180)):
        own = np.pad(contributions[rows], ((0, 0), (0, 18)))
        share = 16 if step >= 100 else 0
        own[:share, 199] = np.random.default_rng(step).random(share)
        answers = [answer_of(row) for row in own]
        stream.add(step, sums_of(answers), {})
    assert suspects(stream)[0] == 199
    (alarm,) = [one for one in stream.alarms if one.latents]
    (paid,) = alarm.latents
    assert 100 < alarm.step < 130
    assert (paid.baseline, paid.strength) == (0.0, 0.0)
    assert paid.shift == paid.rate > 0


def test_a_figure_beside_the_latents_alarms_by_its_name():
    contributions = pool(1, num_latents=20)
    stream = DriftStream(20)
    rng = np.random.default_rng(0)
    for step, rows in enumerate(steps(contributions, 1, 120)):
        signals = {"injected": rng.binomial(64, 0.02 if step < 60 else 0.2) / 64}
        if step % 2:
            signals["length_correlation"] = rng.normal()
        stream.add(step, sums_of([answer_of(contributions[row]) for row in rows]), signals)
    assert [(alarm.latents, alarm.signals) for alarm in stream.alarms] == [((), ("injected",))]
    assert 60 <= stream.alarms[0].step < 80
    found = stream.signals()
    assert found["injected"]["now"] > 0.1 > found["injected"]["baseline"]
    assert found.keys() == {"injected", "length_correlation"}
    assert set(found) < set(SIGNALS)


def test_what_is_paid_sums_to_the_shift_and_a_reset_begins_anew():
    contributions = pool(2)
    hacked = payer(contributions, 0.3)
    stream, alarm = watched(contributions, steps(contributions, 2, 200, hacked, 50), 2)
    assert alarm is not None
    found = stream.shifts()
    assert found is not None
    assert sum(one.shift for one in stream.paid(182)) == pytest.approx(found.shift.sum(), abs=1e-6)
    assert alarm.shift == pytest.approx(found.shift.sum())
    assert 0 < concentration(found) <= 1
    stream.reset()
    assert (stream.num_steps, stream.alarms, stream.paid(5), stream.is_watching) == (0, [], [], False)


def test_the_same_steps_say_the_same():
    contributions = pool(3)
    hacked = payer(contributions, 0.3)
    runs = [watched(contributions, steps(contributions, 3, 120, hacked, 40), 9) for _ in range(2)]
    assert runs[0][1] == runs[1][1] is not None
    assert runs[0][1].step > FIRST_STEPS
