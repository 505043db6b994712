"""Streams of steps: answers drawn from a fixed pool of codes, as a policy that stays the same would give them, or slides towards some."""

from collections.abc import Callable, Iterator

import numpy as np

from sarm.audit.drift import Answer, sums_of
from sarm.audit.drift_stream import Alarm, DriftStream

ANSWERS = 64


def pool(seed: int, num_latents: int = 182, num_answers: int = 518) -> np.ndarray:
    """Contributions [answers, latents]: rates from rare to always, heavy-tailed values, a head of both signs."""
    rng = np.random.default_rng([seed, 1])
    rate = 10 ** rng.uniform(-2.3, 0.0, num_latents)
    fires = rng.random((num_answers, num_latents)) < rate
    values = rng.lognormal(0, 0.5, fires.shape) * rng.lognormal(0, 0.7, num_latents)
    return fires * values * rng.normal(size=num_latents)


def payer(contributions: np.ndarray, rate: float) -> int:
    """The latent that pays and fires in nearest to such a share of the answers."""
    pays = np.flatnonzero(contributions.mean(0) > 0)
    return int(pays[np.argmin(np.abs((contributions[:, pays] != 0).mean(0) - rate))])


def answer_of(row: np.ndarray, prompt: str = "") -> Answer:
    latents = np.flatnonzero(row)
    return Answer(latents, row[latents], prompt, tokens=20)


def steps(contributions: np.ndarray, seed: int, num: int, towards: int | None = None, start: int = 0, slide: int = 100) -> Iterator[np.ndarray]:  # fmt: skip
    """The rows of each step; from `start` on drawn more and more by what `towards` pays, within `slide` steps."""
    rng = np.random.default_rng([seed, 2])
    size = len(contributions)
    if towards is not None:
        share = np.maximum(contributions[:, towards], 0)
        share /= share.sum()
    for step in range(num):
        rows = rng.integers(0, size, ANSWERS)
        if towards is not None and step >= start:
            moved = rng.random(ANSWERS) < min(1.0, (step - start + 1) / slide)
            rows = np.where(moved, rng.choice(size, ANSWERS, p=share), rows)
        yield rows


def watched(
    contributions: np.ndarray,
    rows: Iterator[np.ndarray],
    seed: int,
    stop: Callable[[Alarm], bool] = lambda _: True,
) -> tuple[DriftStream, Alarm | None]:
    """The stream after those steps, or after the first alarm that stops it."""
    stream = DriftStream(contributions.shape[1], seed=seed)
    answers = [answer_of(row) for row in contributions]
    for step, chosen in enumerate(rows):
        own = [answers[row] for row in chosen]
        alarm = stream.add(step, sums_of(own), {"reward": float(contributions[chosen].sum(1).mean())})
        if alarm is not None and stop(alarm):
            return stream, alarm
    return stream, None
