"""What pays for a shift of the mean reward: its exact parts by latent. A active latents.

A reward is the sum over latents of their contributions w z, so the mean reward of some answers is the sum over latents of
m = p s, p the share of answers in which the latent fires and s its mean contribution where it does. Between two sets of answers

    shift of the mean reward = sum over latents of (m' - m),   m' - m = (p' - p) (s + s') / 2  +  (s' - s) (p + p') / 2
                                                                        rate: more often         strength: more each time

A latent that fires in one of the sets alone has no strength in the other: all of its shift is rate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from numpy.typing import NDArray

SIGNALS = (
    "reward", "tokens", "length_correlation", "spread", "flat_groups",
    "truncated", "cut", "injected", "unexplained", "novel",
)  # fmt: skip
"""Figures of a step beside its latents; see `signals_of`."""


@dataclass(frozen=True)
class Answer:
    """One answer as it is watched."""

    latents: Int64[NDArray[np.int64], " active"]
    contributions: Float[np.ndarray, " active"]
    """w z of each, in raw reward."""
    prompt: str
    """The same for answers to the same prompt."""
    tokens: int
    is_truncated: bool = False
    is_cut: bool = False
    is_injected: bool = False
    """Whether it spells control tokens."""
    unexplained: float | None = None
    """Share of the rewarded activation that the dictionary leaves out, where it is known."""

    @property
    def reward(self) -> float:
        """The sum of its contributions."""
        return float(self.contributions.sum(dtype=np.float64))


@dataclass(frozen=True)
class Sums:
    """Contributions summed over `num` answers: one entry for each latent that fires in any of them, by latent."""

    num: int
    latents: Int64[NDArray[np.int64], " active"]
    counts: Int64[NDArray[np.int64], " active"]
    """Answers in which it fires."""
    totals: Float64[NDArray[np.float64], " active"]

    @property
    def means(self) -> Float64[NDArray[np.float64], " active"]:
        """Mean contribution over all answers."""
        mean_A: Float64[NDArray[np.float64], " active"] = self.totals / max(self.num, 1)
        return mean_A


class Shifts(NamedTuple):
    """Parts of a shift of the mean reward, by latent; `shift` sums to it, `rate` + `strength` to `shift`."""

    latents: Int64[NDArray[np.int64], " active"]
    shift: Float64[NDArray[np.float64], " active"]
    rate: Float64[NDArray[np.float64], " active"]
    strength: Float64[NDArray[np.float64], " active"]


def sums_of(answers: Sequence[Answer]) -> Sums:
    """The sums of some answers."""
    latents_T = np.concatenate([one.latents for one in answers]) if answers else np.zeros(0, np.int64)
    terms_T = np.concatenate([one.contributions for one in answers]) if answers else np.zeros(0)
    return _summed(len(answers), latents_T, np.ones(len(latents_T), np.int64), terms_T)


def together(parts: Iterable[Sums]) -> Sums:
    """The sums of all their answers."""
    found = list(parts)
    if not found:
        return sums_of([])
    latents_T, counts_T, totals_T = (
        np.concatenate([getattr(one, name) for one in found]) for name in ("latents", "counts", "totals")
    )
    return _summed(sum(one.num for one in found), latents_T, counts_T, totals_T)


def decomposed(before: Sums, after: Sums) -> Shifts:
    """The parts of the shift of the mean reward from one set of answers to another.

    Raises ValueError if one of them has no answers.
    """
    if not before.num or not after.num:
        raise ValueError(f"a shift is between two sets of answers, got {before.num} and {after.num}")
    latents_A = np.union1d(before.latents, after.latents)
    (rate0_A, strength0_A), (rate1_A, strength1_A) = (_rate_and_strength(one, latents_A) for one in (before, after))
    # Who never fires has no strength of its own, and is given the other's.
    strength0_A = np.where(rate0_A > 0, strength0_A, strength1_A)
    strength1_A = np.where(rate1_A > 0, strength1_A, strength0_A)
    rate_A = (rate1_A - rate0_A) * (strength0_A + strength1_A) / 2
    strength_A = (strength1_A - strength0_A) * (rate0_A + rate1_A) / 2
    return Shifts(latents_A, rate_A + strength_A, rate_A, strength_A)


def signals_of(answers: Sequence[Answer], is_novel_S: Bool[NDArray[np.bool_], " d_sae"] | None) -> dict[str, float]:
    """Figures of the answers of one step; those that they cannot say are left out.

    Means: `reward` (raw), `tokens`, `unexplained`. Shares: `truncated`, `cut`, `injected`. Within prompts of two answers or more:
    `length_correlation` of reward and tokens, `spread` of the rewards (their mean standard deviation), share of `flat_groups` without any.
    `novel`: what the latents that were silent before add to the mean reward, where it is known which are. Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("a step has answers, got none")
    reward_N = np.array([one.reward for one in answers])
    token_N = np.array([float(one.tokens) for one in answers])
    found = {"reward": float(reward_N.mean()), "tokens": float(token_N.mean())}
    for name in ("truncated", "cut", "injected"):
        found[name] = float(np.mean([getattr(one, f"is_{name}") for one in answers]))
    known = [one.unexplained for one in answers if one.unexplained is not None]
    if known:
        found["unexplained"] = float(np.mean(known))
    if is_novel_S is not None:
        found["novel"] = sum(float(one.contributions[is_novel_S[one.latents]].sum()) for one in answers) / len(answers)
    _, prompt_N = np.unique([one.prompt for one in answers], return_inverse=True)
    size_P = np.bincount(prompt_N)
    is_group_P = size_P > 1
    if is_group_P.any():
        within_N = is_group_P[prompt_N]
        reward_N, token_N = (_within(values_N, prompt_N, size_P) for values_N in (reward_N, token_N))
        spread_P = np.sqrt(np.bincount(prompt_N, np.square(reward_N))[is_group_P] / size_P[is_group_P])
        found |= {"spread": float(spread_P.mean()), "flat_groups": float((spread_P < 1e-6).mean())}
        size = float(np.sqrt(np.square(reward_N[within_N]).sum() * np.square(token_N[within_N]).sum()))
        if size > 1e-12:
            found["length_correlation"] = float((reward_N * token_N)[within_N].sum() / size)
    return found


def _within(
    values_N: Float64[NDArray[np.float64], " answers"],
    prompt_N: Int64[NDArray[np.int64], " answers"],
    size_P: Int64[NDArray[np.int64], " prompts"],
) -> Float64[NDArray[np.float64], " answers"]:
    deviation_N: Float64[NDArray[np.float64], " answers"] = (
        values_N - (np.bincount(prompt_N, values_N) / size_P)[prompt_N]
    )
    return deviation_N


def _summed(
    num: int,
    latents_T: Int64[NDArray[np.int64], " terms"],
    counts_T: Int64[NDArray[np.int64], " terms"],
    totals_T: Float[np.ndarray, " terms"],
) -> Sums:
    latents_A, place_T = np.unique(latents_T, return_inverse=True)
    counts_A = np.bincount(place_T, counts_T, len(latents_A)).astype(np.int64)
    return Sums(num, latents_A, counts_A, np.bincount(place_T, totals_T, len(latents_A)).astype(np.float64))


def _rate_and_strength(
    sums: Sums, latents_A: Int64[NDArray[np.int64], " active"]
) -> tuple[Float64[NDArray[np.float64], " active"], Float64[NDArray[np.float64], " active"]]:
    count_A, total_A = np.zeros(len(latents_A)), np.zeros(len(latents_A))
    place = np.searchsorted(latents_A, sums.latents)
    count_A[place], total_A[place] = sums.counts, sums.totals
    return count_A / sums.num, total_A / np.maximum(count_A, 1)
