"""Logistic probe on frozen activations: what the backbone alone already knows. N pairs, M responses, D d_in.

w = argmin C sum_n log(1 + exp(-w.(x_c - x_r)_n / s)) + |w|^2 / 2    s = std of the training activations    reward(x) = w.x / s
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Shaped
from numpy.typing import NDArray

from sarm.settings.checks import UserError

# Inverse strengths of the L2 penalty, strongest first: ties go to the simpler probe.
C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NUM_FOLDS = 5


@dataclass(frozen=True)
class Probe:
    """A linear reward on activations."""

    weight: Float32[NDArray[np.float32], " d_in"]
    """Direction of the reward, [d_in], training scale included."""
    C: float
    """Inverse strength of the penalty that cross-validation chose."""
    cv_nll: dict[float, float]
    """Held-out NLL (nats per pair) of every C over the folds of the training prompts."""

    def rewards(self, x_MD: Float[np.ndarray, "responses d_in"]) -> Float[np.ndarray, " responses"]:
        """Reward of each activation; only differences between them mean anything, as there is no intercept."""
        return x_MD.astype(np.float32, copy=False) @ self.weight


def fit_probe(
    chosen_ND: Float[np.ndarray, "pairs d_in"],
    rejected_ND: Float[np.ndarray, "pairs d_in"],
    prompt_ids_N: Shaped[np.ndarray, " pairs"],
    seed: int,
) -> Probe:
    """Fit on the standardised activations of training pairs.

    The strength of the penalty comes from cross-validation that keeps a prompt's pairs in one fold, so the held-out
    pairs of the evaluation play no part in it.

    Raises UserError with fewer than 3 prompts or with activations that are not finite.
    """
    num_prompts = len(np.unique(prompt_ids_N))
    if num_prompts < 3:
        raise UserError(
            f"the probe needs training pairs of at least 3 prompts, got {num_prompts}. Pass more --data.pairs."
        )
    if not (np.isfinite(chosen_ND).all() and np.isfinite(rejected_ND).all()):
        raise UserError("the probe got activations that are not finite. Extract them again with bfloat16.")
    scale_D = np.concatenate([chosen_ND, rejected_ND]).std(axis=0, dtype=np.float64)
    scale_D[scale_D == 0] = 1.0
    x_ND = ((chosen_ND - rejected_ND) / scale_D).astype(np.float32)
    best, nll_by_C = choose_penalty(x_ND, prompt_ids_N, seed)
    return Probe((fit_head(x_ND, best) / scale_D).astype(np.float32), best, nll_by_C)


def choose_penalty(
    x_ND: Float[np.ndarray, "pairs d_in"],
    prompt_ids_N: Shaped[np.ndarray, " pairs"],
    seed: int,
    margin_N: Float[np.ndarray, " pairs"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[float, dict[float, float]]:
    """The C of the lowest held-out loss over folds of prompts, and the loss of every C (nats per pair).

    The C is for `fit_head` on differences of this very scale: another scale of x is another penalty.
    """
    # A second of imports, which workers that fit no probe can do without.
    from sklearn.model_selection import GroupKFold

    folds = GroupKFold(min(NUM_FOLDS, len(np.unique(prompt_ids_N))), shuffle=True, random_state=seed)
    required_N = np.zeros(len(x_ND)) if margin_N is None else margin_N
    nll_by_C = dict.fromkeys(C_GRID, 0.0)
    for train, test in folds.split(x_ND, groups=prompt_ids_N):
        for C in C_GRID:
            weight_D = fit_head(x_ND[train], C, None if margin_N is None else margin_N[train], label_smoothing)
            m_N = (x_ND[test] @ weight_D).astype(np.float64) - required_N[test]
            nll_by_C[C] += float((np.logaddexp(0.0, -m_N) + label_smoothing * m_N).sum()) / len(x_ND)
    return min(C_GRID, key=lambda C: nll_by_C[C]), nll_by_C


def fit_head(
    x_ND: Float[np.ndarray, "pairs d_in"],
    C: float,
    margin_N: Float[np.ndarray, " pairs"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[np.ndarray, " d_in"]:
    """The weights of least `C sum BT(w.x - margin) + |w|^2 / 2` over differences x = chosen - rejected; BT as `nn.losses.bradley_terry`."""
    if label_smoothing or (margin_N is not None and np.any(margin_N)):
        required_N = np.zeros(len(x_ND)) if margin_N is None else margin_N
        return _fit_with_margins(x_ND.astype(np.float64), C, required_N, label_smoothing)
    # log-loss of (x, 1) equals that of (-x, 0) without an intercept: turning every second row around gives the
    # solver its two classes at half the cost of mirroring all rows.
    labels_N = np.arange(len(x_ND)) % 2
    turned_ND = np.where(labels_N[:, None] == 1, x_ND, -x_ND)
    from sklearn.linear_model import LogisticRegression

    weight_D: Float[np.ndarray, " d_in"]
    (weight_D,) = LogisticRegression(C=C, fit_intercept=False, max_iter=1000).fit(turned_ND, labels_N).coef_
    return weight_D


def _fit_with_margins(
    x_ND: Float64[NDArray[np.float64], "pairs d_in"],
    C: float,
    margin_N: Float64[NDArray[np.float64], " pairs"],
    label_smoothing: float,
) -> Float32[NDArray[np.float32], " d_in"]:
    """`fit_head` where a pair asks for a margin or labels are smoothed, which scikit-learn's logistic regression does not know."""
    from scipy.optimize import minimize

    num = len(x_ND)

    def loss_and_gradient(
        w_D: Float64[NDArray[np.float64], " d_in"],
    ) -> tuple[float, Float64[NDArray[np.float64], " d_in"]]:
        m_N = x_ND @ w_D - margin_N
        loss = np.logaddexp(0.0, -m_N) + label_smoothing * m_N
        slope_N = label_smoothing - np.exp(-np.logaddexp(0.0, m_N))
        return float(loss.mean() + w_D @ w_D / (2 * C * num)), x_ND.T @ slope_N / num + w_D / (C * num)

    start_D = np.zeros(x_ND.shape[1])
    options = {"maxiter": 1000, "gtol": 1e-6, "ftol": 0.0}
    found = minimize(loss_and_gradient, start_D, jac=True, method="L-BFGS-B", options=options)
    weight_D: NDArray[np.float32] = found.x.astype(np.float32)
    return weight_D
