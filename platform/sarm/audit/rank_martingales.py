"""Tests of many streams at every step: has any of them changed? H streams (latents, and figures beside them), C capitals of each.

The rank of a step among all steps before it is uniform, and independent of earlier ranks, as long as the steps are exchangeable, that is, as
long as nothing has changed; so is the smoothed p of the rank (Vovk, Gammerman and Shafer 2005, conformal prediction, section 7.1). No
distribution is assumed, and answers of a step may depend on each other. Each stream bets against that:

    p_t   = (steps before that were higher + U (those that were equal + 1)) / (steps before + 1)
    bets  = k p^(k-1) that it rises, k (1-p)^(k-1) that it falls, for a few k; each has mean 1 while nothing changes
    capital sleeps without betting, wakes at a small rate into the bets, and falls asleep again (Volkhonskiy et al. 2017)

The capital of a stream is a martingale from 1 on while nothing changes, so it ever reaches 1 / a with probability a at most (Ville). Two
things are left that make this a bound in practice rather than in proof: after `MAX_STEPS` ranks are among the first ones alone, and a stream
is bet on once it has been other than 0, so that the bets on a rare latent know that it has fired. An
alarm is a capital of 1 / (level x the stream's weight). Weights sum to 1, so the chance that any stream ever alarms while nothing changes is
at most the level, however streams depend on each other and however often one looks. False discoveries are then as rare.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import NDArray

# Bets are made from so many steps on: of few, no rank is extreme.
FIRST_STEPS = 20
# Ranks are among the first so many steps: memory has an end. Of 4,000 streams in which nothing changed, 1.4 % had reached a capital of 20
# after 15,000 further steps, where 5 % may; 1.2 % had before.
MAX_STEPS = 4096
_POWERS = np.array([0.2, 0.5])
_WAKES, _SLEEPS = 0.001, 0.05
# Steps whose capital is out of any doubt need not overflow.
_CAP = 1e200


class RankMartingales:
    """Streams of numbers, most of which are 0 at most steps. `seed` is that of the ties' U."""

    def __init__(self, num: int, seed: int = 0):
        self._num, self._seed, self._steps = num, seed, 0
        self._kept: dict[int, array[float]] = {}
        self._seen_H, self._above_H, self._below_H = (np.zeros(num, np.int64) for _ in range(3))
        self._capital_HC = np.zeros((num, 1 + 2 * len(_POWERS)))
        self._capital_HC[:, 0] = 1.0
        self._highest_H = np.ones(num)

    @property
    def evidence(self) -> Float64[NDArray[np.float64], " streams"]:
        """The highest capital of each stream so far."""
        return self._highest_H

    @property
    def has_moved(self) -> Bool[NDArray[np.bool_], " streams"]:
        """Which streams have ever been other than 0."""
        moved_H: Bool[NDArray[np.bool_], " streams"] = self._above_H + self._below_H > 0
        return moved_H

    def add(
        self,
        streams: Int64[NDArray[np.int64], " moving"],
        values: Float64[NDArray[np.float64], " moving"],
        missing: Sequence[int] = (),
    ) -> None:
        """A step: the values of some streams; the others are 0, but for those that are `missing` and have none."""
        zeros_H = self._seen_H - self._above_H - self._below_H
        higher_H, equal_H = self._above_H.copy(), zeros_H.copy()
        for stream, value in zip(streams.tolist(), values.tolist(), strict=True):
            if value:
                kept = self._kept.get(stream, array("d"))
                first, last = bisect_left(kept, value), bisect_right(kept, value)
                higher_H[stream] = len(kept) - last + (zeros_H[stream] if value < 0 else 0)
                equal_H[stream] = last - first
        uniform_H = np.random.default_rng([self._seed, self._steps]).random(self._num)
        p_H = (higher_H + uniform_H * (equal_H + 1)) / (self._seen_H + 1)
        bets_H = self.has_moved & (self._seen_H >= FIRST_STEPS)
        bets_H[list(missing)] = False
        self._bet(np.flatnonzero(bets_H), p_H)
        self._keep(streams, values, missing)
        self._steps += 1

    def _bet(self, betting: Int64[NDArray[np.int64], " betting"], p_H: Float64[NDArray[np.float64], " streams"]) -> None:  # fmt: skip
        capital = self._capital_HC[betting]
        asleep, awake = capital[:, :1], capital[:, 1:]
        woken = (1 - _SLEEPS) * awake + _WAKES / awake.shape[1] * asleep
        asleep = (1 - _WAKES) * asleep + _SLEEPS * awake.sum(axis=1, keepdims=True)
        p = np.clip(p_H[betting, None], 1e-12, 1 - 1e-12)
        bets = np.hstack([_POWERS * p ** (_POWERS - 1), _POWERS * (1 - p) ** (_POWERS - 1)])
        self._capital_HC[betting] = np.minimum(np.hstack([asleep, woken * bets]), _CAP)
        self._highest_H[betting] = np.maximum(self._highest_H[betting], self._capital_HC[betting].sum(axis=1))

    def _keep(
        self,
        streams: Int64[NDArray[np.int64], " moving"],
        values: Float64[NDArray[np.float64], " moving"],
        missing: Sequence[int],
    ) -> None:
        if self._steps >= MAX_STEPS:
            return
        for stream, value in zip(streams.tolist(), values.tolist(), strict=True):
            if value:
                kept = self._kept.setdefault(stream, array("d"))
                kept.insert(bisect_right(kept, value), value)
        self._above_H[streams] += values > 0
        self._below_H[streams] += values < 0
        self._seen_H += 1
        self._seen_H[list(missing)] -= 1
