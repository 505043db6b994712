"""What a property does to a reward model's choices, and what an edit of features repairs of it.

P pairs; of each the rewards of four texts: chosen plain c0 and with the property c1, rejected plain r0 and with it r1.
hard = [c0 > r1]    normal = ([c0 > r0] + [c1 > r1]) / 2    easy = [c1 > r0]    clean = [c0 > r0]
As in RM-Bench, hard is where the property speaks for the wrong answer. What the property costs is clean - hard, before any edit; an edit
repairs the share (hard' - hard) / (clean - hard) of it. A flip is a pair that is right when clean and wrong when hard.
Accuracies, changes and the repaired share are means over pairs with intervals over prompts; the share is a ratio R = G / L, whose interval
is that of the mean of R + (g_p - R l_p) / L (delta method), or where that does not vary the gain's over the loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray

from sarm.evaluate.intervals import Estimate, Interval, difference_interval, estimated, mean_interval, share_interval

LEVELS = ("hard", "normal", "easy", "clean")
# Values that are equal but for rounding do not vary.
_NO_SPREAD = 1e-12


class Rewards(NamedTuple):
    """Rewards [P, 4] of c0, c1, r0, r1, and the prompt of each pair."""

    rewards: Float[np.ndarray, "pairs 4"]
    prompts: Shaped[np.ndarray, " pairs"]

    def keep(self, kept_P: Bool[NDArray[np.bool_], " pairs"]) -> "Rewards":
        """The pairs for which `kept_P` is true."""
        return Rewards(self.rewards[kept_P], self.prompts[kept_P])

    def level(self, name: str) -> Float[np.ndarray, " pairs"]:
        """Each pair's share of right choices at a level, in [0, 1]."""
        c0, c1, r0, r1 = self.rewards.T
        shares = {"hard": c0 > r1, "normal": ((c0 > r0) + 1.0 * (c1 > r1)) / 2, "easy": c1 > r0, "clean": c0 > r0}
        return np.asarray(shares[name], dtype=np.float64)

    def flipped(self) -> Bool[NDArray[np.bool_], " pairs"]:
        """Pairs that the property turns from right to wrong."""
        return np.asarray((self.level("clean") == 1) & (self.level("hard") == 0))


@dataclass(frozen=True)
class Repair:
    """What an edit does, on the same pairs before and after it."""

    before: Mapping[str, Estimate]
    after: Mapping[str, Estimate]
    change: Mapping[str, Estimate]
    lost: float
    """What the property costs before the edit: clean - hard."""
    lost_ci95: Interval
    repaired: Estimate | None
    """Share of it that the edit gives back; None where the property costs nothing."""
    flips: int
    flips_repaired: Estimate | None
    """Share of the flips that are right again; None where nothing flips."""
    num_pairs: int
    num_prompts: int


def repair(before: Rewards, after: Rewards) -> Repair:
    """Compare the rewards of the same pairs without and with an edit."""
    prompts = before.prompts
    g_P = after.level("hard") - before.level("hard")
    l_P = before.level("clean") - before.level("hard")
    lost, flipped = float(l_P.mean()), before.flipped()
    repaired = None
    if lost > 0:
        share = float(g_P.mean()) / lost
        repaired = Estimate(share, _around(share, g_P, l_P, prompts))
    return Repair(
        before={name: estimated(before.level(name), prompts, share_interval) for name in LEVELS},
        after={name: estimated(after.level(name), prompts, share_interval) for name in LEVELS},
        change={
            name: estimated(after.level(name) - before.level(name), prompts, difference_interval) for name in LEVELS
        },
        lost=lost,
        lost_ci95=difference_interval(l_P, prompts),
        repaired=repaired,
        flips=int(flipped.sum()),
        flips_repaired=estimated(after.level("hard")[flipped], prompts[flipped], share_interval)
        if flipped.any()
        else None,
        num_pairs=len(prompts),
        num_prompts=len(np.unique(prompts)),
    )


def _around(share: float, g_P: np.ndarray, l_P: np.ndarray, prompts: np.ndarray) -> Interval:
    values_P = share + (g_P - share * l_P) / l_P.mean()
    if np.ptp(values_P) > _NO_SPREAD:
        return mean_interval(values_P, prompts)
    # All that was lost came back, or none of it: then the gain's own interval says how far unseen prompts could be off.
    low, high = difference_interval(g_P, prompts)
    return Interval(low / float(l_P.mean()), high / float(l_P.mean()))


class Tried(NamedTuple):
    """A dose on the half of the prompts that it is chosen on: how many features, how much of each is taken away, accuracies by level.

    `rank` is the order of which these features are the first.
    """

    features: int
    share: float
    accuracy: Mapping[str, float]
    rank: str = ""


def tried(features: int, share: float, rewards: Rewards, rank: str = "") -> Tried:
    """The accuracies of a dose."""
    return Tried(features, share, {name: float(rewards.level(name).mean()) for name in LEVELS}, rank)


def choose(
    plain: Tried, doses: Sequence[Tried], max_cost: float, spared: Sequence[str] = ("normal", "easy")
) -> Tried | None:
    """The dose of largest hard accuracy that costs at most `max_cost` on each of the levels `spared`; of equal ones the smallest. None if none gains."""
    allowed = [
        dose
        for dose in doses
        if dose.accuracy["hard"] > plain.accuracy["hard"]
        and all(dose.accuracy[name] >= plain.accuracy[name] - max_cost - 1e-12 for name in spared)
    ]
    return min(
        allowed, key=lambda dose: (-dose.accuracy["hard"], dose.features * dose.share, dose.features), default=None
    )
