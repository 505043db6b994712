"""Retraining the head alone, on cached codes: milliseconds a run. N pairs, F latents that tell some pair apart.

The objective is that of the SARM's own training, on codes that stand still:

    w = argmin  C sum_n BT(sign_n w.x_n / s - margin_n) + |w|^2 / 2      s^2 = mean x^2 of the training pairs

with the annotated margins and the label smoothing that it was trained with. A flipped pair keeps its margin: the other response is then
said to be better by as much. s does not depend on which response of a pair is called the chosen one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from sarm.audit.codes import AuditCodes
from sarm.evaluate.probe import choose_penalty, fit_head
from sarm.evaluate.statistics import pair_credit

_FOLDS = 5


class Repetition(NamedTuple):
    """One seed of a study: the training pairs it uses, and the credits of its head on their unchanged labels."""

    rows: Int64[NDArray[np.int64], " rows"]
    credits: dict[str, Float64[NDArray[np.float64], " heldout"]]


class CachedHead:
    """The head on codes: differences of the training pairs on a scale of root mean square 1, and of the held-out ones on the same."""

    def __init__(
        self, codes: AuditCodes, heldout: Mapping[str, AuditCodes], seed: int, *, use_margin: bool, label_smoothing: float
    ):  # fmt: skip
        train = codes.role("train")
        self.alive = np.flatnonzero(np.asarray((train.difference != 0).sum(axis=0)).ravel())
        x_NF = train.difference[:, self.alive].toarray()
        self.scale = root_mean_square(x_NF)
        self.x = (x_NF / self.scale).astype(np.float32)
        self.prompts, self.margins = train.prompts, train.required if use_margin else np.zeros(train.num_pairs)
        self.label_smoothing, self._seed = label_smoothing, seed
        self.heldout = {name: (one.difference[:, self.alive].toarray() / self.scale).astype(np.float32) for name, one in heldout.items()}  # fmt: skip
        # The strength of the penalty of all poisoned and thinned trainings is that of the unchanged labels, as full retraining keeps its settings.
        self.penalty = self.penalty_for(np.arange(train.num_pairs), np.ones(train.num_pairs))

    def penalty_for(
        self, rows: Int64[NDArray[np.int64], " rows"], sign_N: Float64[NDArray[np.float64], " pairs"]
    ) -> float:
        """The C that cross-validation over prompts chooses on these pairs and labels alone."""
        return choose_penalty(x_ND=self._turned(rows, sign_N), prompt_ids_N=self.prompts[rows], seed=self._seed, margin_N=self.margins[rows], label_smoothing=self.label_smoothing)[0]  # fmt: skip

    def fit(
        self,
        rows: Int64[NDArray[np.int64], " rows"],
        sign_N: Float64[NDArray[np.float64], " pairs"],
        penalty: float | None = None,
    ) -> Float32[NDArray[np.float32], " latents"]:
        """Weights trained on some pairs, those with sign -1 flipped."""
        C = self.penalty if penalty is None else penalty
        return fit_head(self._turned(rows, sign_N), C, self.margins[rows], self.label_smoothing)

    def cross_fitted(
        self, rows: Int64[NDArray[np.int64], " rows"], sign_N: Float64[NDArray[np.float64], " pairs"], penalty: float
    ) -> Float64[NDArray[np.float64], " rows"]:  # fmt: skip
        """Margins of these pairs, under the given labels, of heads that have not seen the pair's prompt."""
        x_RF = self._turned(rows, sign_N)
        return _cross_fitted(
            x_ND=x_RF,
            prompts_N=self.prompts[rows],
            seed=self._seed,
            penalty=penalty,
            margin_N=self.margins[rows],
            label_smoothing=self.label_smoothing,
        )

    def credits(
        self, weight_F: Float32[NDArray[np.float32], " latents"]
    ) -> dict[str, Float64[NDArray[np.float64], " heldout"]]:
        """1 for each held-out pair in the right order, by role."""
        return {name: pair_credit((x @ weight_F).astype(np.float64)) for name, x in self.heldout.items()}

    def _turned(
        self, rows: Int64[NDArray[np.int64], " rows"], sign_N: Float64[NDArray[np.float64], " pairs"]
    ) -> Float32[NDArray[np.float32], "rows latents"]:
        turned_NF: NDArray[np.float32] = self.x[rows] * sign_N[rows, None].astype(np.float32)
        return turned_NF


def cross_fitted(
    x_ND: Float[NDArray[np.floating], "pairs d_in"],
    prompts_N: Shaped[NDArray[Any], " pairs"],
    sign_N: Float64[NDArray[np.float64], " pairs"],
    seed: int,
    penalty: float = 1e-3,
) -> Float64[NDArray[np.float64], " pairs"]:
    """Margins, under the given labels, of linear probes that have not seen the pair's prompt."""
    turned_ND = (x_ND / root_mean_square(x_ND) * sign_N[:, None]).astype(np.float32)
    return _cross_fitted(
        x_ND=turned_ND, prompts_N=prompts_N, seed=seed, penalty=penalty, margin_N=None, label_smoothing=0.0
    )


def root_mean_square(x_ND: Float[NDArray[np.floating], "pairs columns"]) -> Float[NDArray[np.floating], " columns"]:
    """Of each column, never 0; turning rows around does not change it, as it would a standard deviation."""
    size_F: NDArray[np.floating] = np.sqrt(np.square(x_ND, dtype=np.float64).mean(axis=0)).astype(x_ND.dtype) + 1e-12
    return size_F


def _cross_fitted(
    x_ND: Float32[NDArray[np.float32], "pairs columns"], prompts_N: Shaped[NDArray[Any], " pairs"], seed: int, penalty: float, margin_N: Float64[NDArray[np.float64], " pairs"] | None, label_smoothing: float
) -> Float64[NDArray[np.float64], " pairs"]:  # fmt: skip
    found_N = np.empty(len(x_ND))
    folds = GroupKFold(min(_FOLDS, len(np.unique(prompts_N))), shuffle=True, random_state=seed)
    for fit, test in folds.split(x_ND, groups=prompts_N):
        found_N[test] = x_ND[test] @ fit_head(x_ND[fit], penalty, None if margin_N is None else margin_N[fit], label_smoothing)  # fmt: skip
    return found_N
