"""Which latents a reward comes from. N pairs, A active latents of all responses, S d_sae.

reward = sum_i w_i z_i, so the contribution w_i z_i of latent i is exact, no approximation of any model
mean contribution of i = sum over responses of w_i z_i / number of responses (zero where i is silent)
margin contribution of i in a pair = w_i (z_i(chosen) - z_i(rejected)); over i they sum to the margin
intercept = sum of the mean contributions of always-on latents: part of every reward, so that no comparison sees it
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float64, Int64
from numpy.typing import NDArray

from sarm.contracts.tables import FEATURES_TABLE
from sarm.evaluate.readability import ALWAYS_ON
from sarm.settings.checks import UserError


class Active(NamedTuple):
    """Active latents of one side of all pairs, flat: row of the pair, latent, contribution w_i z_i."""

    row: Int64[NDArray[np.int64], " active"]
    latent: Int64[NDArray[np.int64], " active"]
    contribution: Float64[NDArray[np.float64], " active"]


class TopFeatures(NamedTuple):
    """FEATURES rows with the largest positive and with the most negative mean contribution, strongest first."""

    raising: pa.Table
    lowering: pa.Table
    always_on: pa.Table
    """Latents that fire on nearly every response, which are in neither of the two."""

    @property
    def intercept(self) -> float:
        """What always-on latents add to the mean reward."""
        return float(mean_contribution(self.always_on).sum())


@dataclass(frozen=True)
class LatentShare:
    """What one latent adds to one pair's margin."""

    latent: int
    weight: float
    chosen_value: float
    rejected_value: float
    contribution: float


@dataclass(frozen=True)
class PairExplanation:
    """A margin as a sum: the named contributions, and the rest of the active latents together."""

    pair_id: str
    chosen_reward: float
    rejected_reward: float
    margin: float
    contributions: tuple[LatentShare, ...]
    rest: float
    num_rest: int


def feature_table(scores: pa.Table, weight_S: Float[np.ndarray, " d_sae"]) -> pa.Table:
    """FEATURES over the latents that fire in at least one response of a PAIR_SCORES table, by latent.

    Frequencies are shares of responses, contributions are in reward units and include the responses where the
    latent is silent.

    Raises UserError if the scores have no latents, or latents outside the head.
    """
    num_pairs = max(1, scores.num_rows)

    def means(active: Active) -> tuple[Float64[NDArray[np.float64], " d_sae"], Float64[NDArray[np.float64], " d_sae"]]:
        frequency_S = np.bincount(active.latent, minlength=len(weight_S)) / num_pairs
        return frequency_S, np.bincount(active.latent, active.contribution, len(weight_S)) / num_pairs

    frequency_chosen_S, chosen_S = means(_active(scores, "chosen", weight_S))
    frequency_rejected_S, rejected_S = means(_active(scores, "rejected", weight_S))
    alive = np.flatnonzero(frequency_chosen_S + frequency_rejected_S)
    columns = {
        "latent": alive,
        "weight": weight_S[alive],
        "frequency_chosen": frequency_chosen_S[alive],
        "frequency_rejected": frequency_rejected_S[alive],
        "mean_contribution_chosen": chosen_S[alive],
        "mean_contribution_rejected": rejected_S[alive],
        "mean_margin_contribution": (chosen_S - rejected_S)[alive],
    }
    return pa.table([pa.array(columns[f.name]).cast(f.type, safe=False) for f in FEATURES_TABLE], schema=FEATURES_TABLE)


def check_completeness(scores: pa.Table, weight_S: Float[np.ndarray, " d_sae"]) -> float:
    """Largest |reward - sum w_i z_i| of any response; rounding only, if the reward is what its latents say it is.

    NaN if any reward is not finite; 0 for an empty table. Raises as `feature_table`.
    """
    gaps = [0.0]
    for side in ("chosen", "rejected"):
        active = _active(scores, side, weight_S)
        total_N = np.bincount(active.row, active.contribution, scores.num_rows)
        with np.errstate(invalid="ignore"):
            gap_N = np.abs(scores[f"{side}_reward"].to_numpy().astype(np.float64) - total_N)
        gaps.append(float(np.max(np.where(np.isfinite(gap_N), gap_N, np.nan), initial=0.0)))
    return float(np.max(gaps))


def top_features(features: pa.Table, n: int) -> TopFeatures:
    """The at most `n` latents that raise, and that lower, the reward most by mean contribution over all responses.

    Raising latents have a positive mean, lowering ones a negative mean; equal means are ordered by latent. Latents that fire on at
    least 95 % of the responses stand apart: they tell no response from another.
    """
    often_F = (features["frequency_chosen"].to_numpy() + features["frequency_rejected"].to_numpy()) / 2 >= ALWAYS_ON
    always_on, features = features.filter(pa.array(often_F)), features.filter(pa.array(~often_F))
    mean_F = mean_contribution(features)
    latent_F = features["latent"].to_numpy()
    descending = np.lexsort((latent_F, -mean_F))
    ascending = np.lexsort((latent_F, mean_F))
    return TopFeatures(
        features.take(pa.array(descending[mean_F[descending] > 0][:n], pa.int64())),
        features.take(pa.array(ascending[mean_F[ascending] < 0][:n], pa.int64())),
        always_on,
    )


def mean_contribution(features: pa.Table) -> Float[np.ndarray, " features"]:
    """Mean contribution over chosen and rejected responses together, in reward units."""
    chosen_F = features["mean_contribution_chosen"].to_numpy().astype(np.float64)
    mean_F: Float[np.ndarray, " features"] = (chosen_F + features["mean_contribution_rejected"].to_numpy()) / 2
    return mean_F


def pair_explanation(scores: pa.Table, pair_id: str, weight_S: Float[np.ndarray, " d_sae"], n: int) -> PairExplanation:
    """The margin of one pair as the `n` largest contributions by size, and the rest as one number.

    Raises UserError if there is no such pair, or as `feature_table`.
    """
    row = scores.filter(pc.equal(scores["pair_id"], pair_id))
    if row.num_rows != 1:
        raise UserError(f"expected one pair {pair_id!r} in the scores, got {row.num_rows}.")
    value_2S = np.zeros((2, len(weight_S)))
    for side, name in enumerate(("chosen", "rejected")):
        latent_A, value_A = active_latents(row, name, len(weight_S))[1:]
        value_2S[side, latent_A] = value_A
    contribution_S = weight_S.astype(np.float64) * (value_2S[0] - value_2S[1])
    active = np.flatnonzero(value_2S.any(axis=0))
    # Stable, so that equal sizes stay in order of latents.
    active = active[np.argsort(-np.abs(contribution_S[active]), kind="stable")]
    named, rest = active[:n], active[n:]
    chosen, rejected = row["chosen_reward"][0].as_py(), row["rejected_reward"][0].as_py()
    return PairExplanation(
        pair_id=pair_id,
        chosen_reward=chosen,
        rejected_reward=rejected,
        margin=chosen - rejected,
        contributions=tuple(
            LatentShare(
                latent=int(i),
                weight=float(weight_S[i]),
                chosen_value=float(value_2S[0, i]),
                rejected_value=float(value_2S[1, i]),
                contribution=float(contribution_S[i]),
            )
            for i in named
        ),
        rest=float(contribution_S[rest].sum()),
        num_rest=len(rest),
    )


def pair_contributions(scores: pa.Table, weight_S: Float[NDArray[np.floating], " d_sae"]) -> Active:
    """What each latent adds to each margin of a PAIR_SCORES table, an entry a pair and latent, by pair then latent.

    Raises as `feature_table`.
    """
    chosen, rejected = (_active(scores, side, weight_S) for side in ("chosen", "rejected"))
    row, latent = (np.concatenate(parts) for parts in zip(chosen[:2], rejected[:2], strict=True))
    key, place = np.unique(row * len(weight_S) + latent, return_inverse=True)
    contribution = np.bincount(place, np.concatenate([chosen.contribution, -rejected.contribution]), len(key))
    return Active(key // len(weight_S), key % len(weight_S), contribution.astype(np.float64))


def _active(scores: pa.Table, side: str, weight_S: Float[NDArray[np.floating], " d_sae"]) -> Active:
    row_A, latent_A, value_A = active_latents(scores, side, len(weight_S))
    return Active(row_A, latent_A, weight_S.astype(np.float64)[latent_A] * value_A)


def active_latents(
    scores: pa.Table, side: str, d_sae: int
) -> tuple[
    Int64[NDArray[np.int64], " active"], Int64[NDArray[np.int64], " active"], Float64[NDArray[np.float64], " active"]
]:
    """Rows, latents and values of one side, without the slots that TopK left at zero."""
    latents, values = (scores[f"{side}_{name}"].combine_chunks() for name in ("latents", "values"))
    if latents.null_count or values.null_count:
        raise UserError("these scores have no latents to attribute rewards to. Score the pairs with a SARM.")
    row_A = pc.list_parent_indices(latents).to_numpy()
    latent_A = pc.list_flatten(latents).to_numpy().astype(np.int64)
    value_A = pc.list_flatten(values).to_numpy().astype(np.float64)
    if len(latent_A) != len(value_A):
        raise UserError(f"the scores have {len(latent_A)} latents but {len(value_A)} values. Score the pairs again.")
    if len(latent_A) and not 0 <= latent_A.min() <= latent_A.max() < d_sae:
        raise UserError(
            f"the scores name latent {latent_A.max()}, but the head has d_sae={d_sae}. Pass the SARM that made them."
        )
    fires = value_A != 0
    return row_A[fires], latent_A[fires], value_A[fires]
