"""SparseRM (arXiv 2511.07896): a small head on a frozen model's activations, projected onto the directions of preference-relevant latents.

N pairs, M responses, D d_in, S d_sae, F directions.
t_i  = mean_n(z_c - z_r)_i / sd_n(z_c - z_r)_i sqrt(N)     contrast of latent i between the chosen and the rejected responses of the training pairs
set  = the F / 2 latents with the largest t, which speak for chosen responses, and the F / 2 with the smallest
p_F  = x . d_i / |d_i| for i in the set, d_i row i of W_dec, x the rows that the SAE takes
r(x) = w . p / s    s the deviation of p over the training responses, w by penalised Bradley-Terry (`probe.fit_head`)

The projections are of x itself, and not codes: a latent that loses against others in TopK still has one. F and the penalty are chosen by
cross-validation over prompts, in each fold with directions chosen on the other folds. The paper describes the head as one layer; it is linear here,
and all of the reward is a direction of F parameters in D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped
from numpy.typing import NDArray
from scipy import sparse

from sarm.evaluate.probe import C_GRID, NUM_FOLDS, fit_head
from sarm.settings.checks import UserError

NUM_DIRECTIONS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class SparseRm:
    """A linear reward on a few directions of a dictionary."""

    latents: Int64[NDArray[np.int64], " directions"]
    """Whose decoder rows the activations are projected onto, strongest contrast first."""
    head: Float32[NDArray[np.float32], " directions"]
    """What each projection counts, deviation included: the only parameters that are trained."""
    weight: Float32[NDArray[np.float32], " d_in"]
    """The same reward as a direction of the rows that the SAE takes."""
    C: float
    cv_nll: dict[int, float]
    """Held-out loss (nats per pair) of every number of directions, with its best penalty, over the folds of the training prompts."""

    def rewards(self, x_MD: Float[np.ndarray, "responses d_in"]) -> Float[np.ndarray, " responses"]:
        """Reward of each row; only differences mean anything, as there is no intercept."""
        return x_MD.astype(np.float32, copy=False) @ self.weight


def fit_sparse_rm(
    chosen_ND: Float[np.ndarray, "pairs d_in"],
    rejected_ND: Float[np.ndarray, "pairs d_in"],
    difference_NS: sparse.csr_array,
    W_dec_SD: Float[np.ndarray, "d_sae d_in"],
    prompt_ids_N: Shaped[np.ndarray, " pairs"],
    seed: int,
    counts: Sequence[int] = NUM_DIRECTIONS,
) -> SparseRm:
    """Fit on the rows (`Sae.rows_of`) and code differences z_c - z_r of training pairs.

    Raises UserError with fewer than 3 prompts, rows that are not finite, or if no latent tells chosen from rejected.
    """
    from sklearn.model_selection import GroupKFold

    num_prompts = len(np.unique(prompt_ids_N))
    if num_prompts < 3:
        raise UserError(f"SparseRM needs training pairs of at least 3 prompts, got {num_prompts}. Pass more --data.pairs.")  # fmt: skip
    if not (np.isfinite(chosen_ND).all() and np.isfinite(rejected_ND).all()):
        raise UserError("SparseRM got activations that are not finite. Extract them again with bfloat16.")
    directions_SD = W_dec_SD / np.maximum(np.linalg.norm(W_dec_SD, axis=1, keepdims=True), 1e-12)
    x_ND = (chosen_ND - rejected_ND).astype(np.float64)
    folds = GroupKFold(min(NUM_FOLDS, num_prompts), shuffle=True, random_state=seed)
    loss: dict[tuple[int, float], float] = {(count, C): 0.0 for count in counts for C in C_GRID}
    for train, test in folds.split(x_ND, groups=prompt_ids_N):
        order = contrast_order(difference_NS[train])
        for count in counts:
            p_NF, scale_F = _projected(x_ND, chosen_ND[train], rejected_ND[train], directions_SD, order[:count])
            for C in C_GRID:
                margins = p_NF[test] @ fit_head(p_NF[train].astype(np.float32), C) if len(scale_F) else np.zeros(len(test))  # fmt: skip
                loss[count, C] += float(np.logaddexp(0.0, -margins.astype(np.float64)).sum()) / len(x_ND)
    # The fewest directions, and the strongest penalty, of equal losses.
    count, C = min(loss, key=lambda key: (loss[key], key))
    latents = contrast_order(difference_NS)[:count]
    if not len(latents):
        raise UserError("no latent of the dictionary tells chosen from rejected responses. Pass more --data.pairs, or another SAE.")  # fmt: skip
    p_NF, scale_F = _projected(x_ND, chosen_ND, rejected_ND, directions_SD, latents)
    head_F = fit_head(p_NF.astype(np.float32), C) / scale_F
    best = {count: min(loss[count, C] for C in C_GRID) for count in counts}
    weight_D = head_F @ directions_SD[latents]
    return SparseRm(latents, head_F.astype(np.float32), weight_D.astype(np.float32), C, best)


def contrast_order(difference_NS: sparse.csr_array) -> Int64[NDArray[np.int64], " latents"]:
    """Latents in turn the strongest for chosen and the strongest for rejected responses, by t; those without a difference are left out."""
    num = difference_NS.shape[0]
    mean_S = np.asarray(difference_NS.mean(axis=0)).ravel()
    square_S = np.asarray(difference_NS.multiply(difference_NS).mean(axis=0)).ravel()
    # A latent with the same difference in all pairs has no deviation, and is as sure as can be.
    deviation_S = np.sqrt(np.maximum(square_S - mean_S**2, 1e-12 * np.maximum(square_S, 1e-30)))
    t_S = mean_S / deviation_S * np.sqrt(num)
    raising, lowering = np.flatnonzero(mean_S > 0), np.flatnonzero(mean_S < 0)
    sides = [raising[np.argsort(-t_S[raising], kind="stable")], lowering[np.argsort(t_S[lowering], kind="stable")]]
    longest = max(len(side) for side in sides)
    turns = [int(side[n]) for n in range(longest) for side in sides if n < len(side)]
    return np.array(turns, dtype=np.int64)


def _projected(
    x_ND: NDArray[np.float64],
    chosen_ND: NDArray[np.floating],
    rejected_ND: NDArray[np.floating],
    directions_SD: NDArray[np.floating],
    latents: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Differences of projections [N, F] in units of their deviation over the responses given, and these deviations [F]."""
    directions_FD = directions_SD[latents].astype(np.float64)
    each_MF = np.concatenate([chosen_ND, rejected_ND]).astype(np.float64) @ directions_FD.T
    scale_F = each_MF.std(axis=0)
    scale_F[scale_F == 0] = 1.0
    return x_ND @ directions_FD.T / scale_F, scale_F
