"""Rewards of a few latents: heads with an L1 penalty on the codes. N pairs, S d_sae.

w = argmin C sum_n log(1 + exp(-w.(z_c - z_r)_n)) + |w|_1    over a path of strengths 1/C, strongest first

Every latent has its own unit: codes are not scaled, so that latents that fire strongly are cheap, as they carry more of the reward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy.typing import NDArray
from scipy import sparse

from sarm.settings.checks import UserError

C_PATH = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
# An L1 solution is sparse exactly; liblinear's coordinate descent leaves true zeros.
_TOLERANCE, _ITERATIONS = 1e-4, 1000
_STRONGER = 0.99


@dataclass(frozen=True)
class SparseHead:
    """A head, and where on the path it lies."""

    weight: NDArray[np.float64]
    """[d_sae], 0 for latents that are left out."""
    C: float
    """Inverse strength of the penalty, for the sum over all pairs."""
    latents_kept: dict[float, int]
    """Latents that the head of every strength keeps, fitted on the pairs that the strength is not chosen by."""
    nll: dict[float, float]
    """Loss of these heads on the other pairs, nats per pair."""

    @property
    def num_latents(self) -> int:
        """Latents that the reward is a sum of."""
        return int(np.count_nonzero(self.weight))


def fit_sparse_head(
    difference_NS: sparse.csr_array,
    prompt_ids_N: Shaped[np.ndarray, " pairs"],
    choosing_N: Bool[np.ndarray, " pairs"],
    max_latents: int | None = None,
    path: Sequence[float] = C_PATH,
) -> SparseHead:
    """The head on code differences z_c - z_r whose strength is chosen on the pairs marked `choosing`, then fitted on all pairs.

    Choose by prompts whose answers the dictionary did not see: on those that it learnt from, codes are too good, and the penalty comes out
    too weak. The strength is the strongest whose loss is within one standard error of the least (Breiman et al. 1984, section 3.4.3); the
    error is over prompts. With `max_latents`, only strengths whose heads keep at most so many count, and the last fit is strengthened until
    it does.

    Raises UserError without a pair on both sides, or if no strength keeps between 1 and `max_latents` latents.
    """
    if choosing_N.all() or not choosing_N.any():
        raise UserError(
            f"a sparse head needs pairs to fit on and others to choose its strength by, got {int((~choosing_N).sum())} and {int(choosing_N.sum())}. Pass more --data.pairs, or another --sae.heldout-share."
        )
    limit = difference_NS.shape[1] if max_latents is None else max_latents
    fitted = {C: _fit(difference_NS[~choosing_N], C) for C in sorted(path)}
    losses = {C: _losses(difference_NS[choosing_N], w_S) for C, w_S in fitted.items()}
    counts = {C: int(np.count_nonzero(w_S)) for C, w_S in fitted.items()}
    nll = {C: float(loss_N.mean()) for C, loss_N in losses.items()}
    usable = [C for C in fitted if 1 <= counts[C] <= limit]
    if not usable:
        raise UserError(
            f"no head of the path keeps between 1 and {limit} latents, they keep {sorted(counts.values())}."
        )
    best = min(usable, key=lambda C: nll[C])
    bound = nll[best] + _standard_error(losses[best], prompt_ids_N[choosing_N])
    chosen = next(C for C in usable if nll[C] <= bound)
    # The loss is a sum over pairs: with more of them the same strength is another C.
    C = chosen * float((~choosing_N).mean())
    weight_S = _fit(difference_NS, C)
    while not weight_S.any() and chosen > C:
        C /= _STRONGER
        weight_S = _fit(difference_NS, C)
    while np.count_nonzero(weight_S) > limit:
        # More pairs brought in more latents than the limit: a slightly stronger penalty.
        C *= _STRONGER
        weight_S = _fit(difference_NS, C)
    if not weight_S.any():
        raise UserError(f"no head keeps between 1 and {limit} latents once it is fitted on all pairs.")
    return SparseHead(weight_S, C, counts, nll)


def _fit(difference_NS: sparse.csr_array, C: float) -> NDArray[np.float64]:
    from sklearn.linear_model import LogisticRegression

    # log-loss of (x, 1) equals that of (-x, 0) without an intercept: the solver gets its two classes by turning every second row around.
    labels_N = np.arange(difference_NS.shape[0]) % 2
    if len(labels_N) < 2:
        raise UserError("a sparse head needs at least 2 pairs. Pass more --data.pairs.")
    turned_NS = sparse.csr_array(difference_NS.multiply((2 * labels_N - 1)[:, None]))
    # liblinear counts in 32 bits.
    places, starts = turned_NS.indices.astype(np.int32), turned_NS.indptr.astype(np.int32)
    turned_NS = sparse.csr_array((turned_NS.data, places, starts), shape=turned_NS.shape)
    solver = LogisticRegression(
        C=C, l1_ratio=1.0, solver="liblinear", fit_intercept=False, max_iter=_ITERATIONS, tol=_TOLERANCE, random_state=0
    )
    weight_S: NDArray[np.float64] = solver.fit(turned_NS, labels_N).coef_[0].astype(np.float64)
    return weight_S


def _losses(difference_NS: sparse.csr_array, weight_S: Float[np.ndarray, " d_sae"]) -> NDArray[np.float64]:
    losses_N: NDArray[np.float64] = np.logaddexp(0.0, -(difference_NS @ weight_S))
    return losses_N


def _standard_error(values_N: NDArray[np.float64], prompt_ids_N: NDArray[np.generic]) -> float:
    """Of a mean over pairs, prompts being what is drawn."""
    _, place_N = np.unique(prompt_ids_N, return_inverse=True)
    sums_C = np.bincount(place_N, values_N - values_N.mean())
    num_prompts = len(sums_C)
    return float(np.sqrt(np.square(sums_C).sum() * num_prompts / max(num_prompts - 1, 1)) / len(values_N))
