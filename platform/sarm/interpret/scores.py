"""How well an explanation tells where its latent fires. n texts, of which n1 fire.

balanced accuracy = (TPR + TNR) / 2, which a judge that always says the same scores 0.5 at.
Its interval is MOVER (Zou and Donner 2008) of the two shares' Wilson intervals (l, u), which are independent samples:
low = b - sqrt((TPR-l1)^2 + (TNR-l0)^2) / 2    high = b + sqrt((u1-TPR)^2 + (u0-TNR)^2) / 2
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Detection(NamedTuple):
    """Balanced accuracy with its 95 % interval, over `num_scored` texts."""

    value: float
    low: float
    high: float
    num_scored: int


def detection(fires: Sequence[bool], said: Sequence[bool]) -> Detection | None:
    """Balanced accuracy of what a judge said; None unless there are texts of both kinds."""
    hits = [answer for truth, answer in zip(fires, said, strict=True) if truth]
    rejections = [not answer for truth, answer in zip(fires, said, strict=True) if not truth]
    if not hits or not rejections:
        return None
    (tpr, low_1, high_1), (tnr, low_0, high_0) = _wilson(hits), _wilson(rejections)
    value = (tpr + tnr) / 2
    low = value - math.hypot(tpr - low_1, tnr - low_0) / 2
    high = value + math.hypot(high_1 - tpr, high_0 - tnr) / 2
    return Detection(value, max(0.0, low), min(1.0, high), len(fires))


def _wilson(right: Sequence[bool]) -> tuple[float, float, float]:
    ends = stats.binomtest(sum(right), len(right)).proportion_ci(0.95, method="wilson")
    return sum(right) / len(right), ends.low, ends.high


def simulation(activations: Sequence[float], levels: Sequence[int]) -> float | None:
    """Pearson's r of true activations and guessed levels over all texts; None if either is constant."""
    if len(activations) < 3 or np.ptp(activations) == 0 or np.ptp(levels) == 0:
        return None
    return float(np.corrcoef(activations, levels)[0, 1])
