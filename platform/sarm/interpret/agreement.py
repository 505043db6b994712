"""Agreement of raters on levels 1..Q. R raters, N items; NaN where a rater gave no usable answer.

Krippendorff (2011), ordinal: alpha = 1 - D_o / D_e over the coincidences o_ck, with delta^2(c,k) = (sum_{g=c..k} n_g - (n_c+n_k)/2)^2.
Gwet (2014, ch. 5) AC2: (p_a - p_e) / (1 - p_e), p_e = T_w / (Q(Q-1)) sum_k pi_k (1 - pi_k), T_w the sum of weights; it stays meaningful
where nearly all ratings are one level, where alpha and kappa fall to 0. Weights are quadratic: w_kl = 1 - (k-l)^2 / (Q-1)^2.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score

LEVELS = 5
THRESHOLDS = (3, 4, 5)

Ratings = Float[np.ndarray, "raters items"]


def krippendorff_alpha(ratings_RN: Ratings, levels: int = LEVELS) -> float | None:
    """Ordinal alpha; None where no item has two ratings, or all ratings are one level (nothing could disagree)."""
    count_NQ = _counts(ratings_RN, levels)
    num_N = count_NQ.sum(axis=1)
    count_NQ, num_N = count_NQ[num_N >= 2], num_N[num_N >= 2]
    # Ordered pairs of ratings of one item, each item weighing as much as it has ratings.
    pairs_NQQ = count_NQ[:, :, None] * count_NQ[:, None, :] - count_NQ[:, :, None] * np.eye(levels)
    observed_QQ = (pairs_NQQ / (num_N - 1)[:, None, None]).sum(axis=0)
    total_Q = observed_QQ.sum(axis=0)
    below_Q = np.concatenate([[0.0], np.cumsum(total_Q)])
    between_QQ = np.array([[below_Q[max(c, k) + 1] - below_Q[min(c, k)] for k in range(levels)] for c in range(levels)])
    delta_QQ = (between_QQ - (total_Q[:, None] + total_Q[None, :]) / 2) ** 2
    expected = float((np.outer(total_Q, total_Q) * delta_QQ).sum())
    if expected == 0:
        return None
    return float(1 - (total_Q.sum() - 1) * float((observed_QQ * delta_QQ).sum()) / expected)


def gwet_ac2(
    ratings_RN: Ratings, levels: int = LEVELS, weights_QQ: Float64[NDArray[np.float64], "levels levels"] | None = None
) -> float | None:
    """AC2 with quadratic weights (with the identity: AC1); None where no item has two ratings."""
    if weights_QQ is None:
        place = np.arange(levels)
        weights_QQ = 1 - (place[:, None] - place[None, :]) ** 2 / (levels - 1) ** 2
    count_NQ = _counts(ratings_RN, levels)
    num_N = count_NQ.sum(axis=1)
    many = num_N >= 2
    if not many.any():
        return None
    agreeing_N = (count_NQ * (count_NQ @ weights_QQ - 1)).sum(axis=1)
    p_a = float((agreeing_N[many] / (num_N * (num_N - 1))[many]).mean())
    rated = num_N > 0
    pi_Q = (count_NQ[rated] / num_N[rated, None]).mean(axis=0)
    p_e = float(weights_QQ.sum() / (levels * (levels - 1)) * (pi_Q * (1 - pi_Q)).sum())
    return (p_a - p_e) / (1 - p_e)


def quadratic_kappa(a_N: Float[np.ndarray, " items"], b_N: Float[np.ndarray, " items"]) -> float | None:
    """Cohen's kappa with quadratic weights over the items that both rated; None where it is undefined."""
    both = ~(np.isnan(a_N) | np.isnan(b_N))
    a, b = a_N[both].astype(int), b_N[both].astype(int)
    if len(np.unique(np.concatenate([a, b]))) < 2:
        return None
    return float(cohen_kappa_score(a, b, labels=range(1, LEVELS + 1), weights="quadratic"))


def jaccard(a: set[int], b: set[int]) -> float | None:
    """Shared part of two sets; None if both are empty."""
    return len(a & b) / len(a | b) if a | b else None


@dataclass(frozen=True)
class WithinJudge:
    """How the repetitions of one judge agree; None where that is undefined."""

    alpha: float | None
    ac2: float | None


@dataclass(frozen=True)
class BetweenJudges:
    """How the first ratings of different judges agree; `kappa` is by pair of judges."""

    alpha: float | None
    ac2: float | None
    kappa: dict[str, float | None]


@dataclass(frozen=True)
class Selected:
    """How many latents each judge puts at or above each threshold, and how much of that set another judge, or another threshold, shares."""

    num: dict[str, dict[str, int]]
    shared_by_judges: dict[str, dict[str, float | None]]
    shared_by_thresholds: dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Agreement:
    """How raters agree on a rubric."""

    num_items: int
    answered: dict[str, float]
    """Share of the items that each judge has rated."""
    between: BetweenJudges
    within: dict[str, WithinJudge]
    """Of judges that were asked more than once."""
    selected: Selected


def agreement(rows: Sequence[Mapping[str, Any]], rubric: str) -> Agreement:
    """How raters agree on a rubric; `rows` have latent, rubric, judge, repeat and rating (None where there is none)."""
    own = [row for row in rows if row["rubric"] == rubric]
    latents = sorted({row["latent"] for row in own})
    judges = sorted({row["judge"] for row in own})
    repeats = {judge: sorted({row["repeat"] for row in own if row["judge"] == judge}) for judge in judges}
    given = {(row["judge"], row["repeat"], row["latent"]): row["rating"] for row in own}

    def line(judge: str, repeat: int) -> list[float]:
        return [np.nan if (r := given.get((judge, repeat, latent))) is None else float(r) for latent in latents]

    first_RN = np.array([line(judge, repeats[judge][0]) for judge in judges]).reshape(len(judges), len(latents))
    pairs = list(itertools.combinations(range(len(judges)), 2))
    chosen = {
        judge: {t: {latents[i] for i in np.flatnonzero(first_RN[r] >= t)} for t in THRESHOLDS}
        for r, judge in enumerate(judges)
    }
    return Agreement(
        num_items=len(latents),
        answered={judge: float(np.mean(~np.isnan(first_RN[r]))) for r, judge in enumerate(judges)},
        between=BetweenJudges(
            alpha=krippendorff_alpha(first_RN) if pairs else None,
            ac2=gwet_ac2(first_RN) if pairs else None,
            kappa={f"{judges[a]} / {judges[b]}": quadratic_kappa(first_RN[a], first_RN[b]) for a, b in pairs},
        ),
        within={
            judge: WithinJudge(
                alpha=krippendorff_alpha(np.array([line(judge, r) for r in repeats[judge]])),
                ac2=gwet_ac2(np.array([line(judge, r) for r in repeats[judge]])),
            )
            for judge in judges
            if len(repeats[judge]) > 1
        },
        selected=Selected(
            num={judge: {str(t): len(found) for t, found in of_t.items()} for judge, of_t in chosen.items()},
            shared_by_judges={
                str(t): {
                    f"{judges[a]} / {judges[b]}": jaccard(chosen[judges[a]][t], chosen[judges[b]][t]) for a, b in pairs
                }
                for t in THRESHOLDS
            },
            shared_by_thresholds={
                judge: {f"{a} / {b}": jaccard(of_t[a], of_t[b]) for a, b in itertools.pairwise(THRESHOLDS)}
                for judge, of_t in chosen.items()
            },
        ),
    )


def _counts(ratings_RN: Ratings, levels: int) -> Float64[NDArray[np.float64], "items levels"]:
    """Ratings of each level that each item has."""
    return np.stack([(ratings_RN == level).sum(axis=0) for level in range(1, levels + 1)], axis=1).astype(np.float64)
