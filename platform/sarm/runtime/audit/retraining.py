"""Retraining the head alone, on cached codes: milliseconds a run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold

from sarm.audit.codes import AuditCodes
from sarm.data.statistics import pair_credit
from sarm.evaluate.probe import fit_head, fit_probe

_FOLDS = 5


class CachedHead:
    """The head on codes: differences of the training pairs scaled to unit variance, and of the held-out ones on the same scale."""

    def __init__(self, codes: AuditCodes, heldout: Mapping[str, AuditCodes], seed: int):
        train = codes.role("train")
        self.alive = np.flatnonzero(np.asarray((train.difference != 0).sum(axis=0)).ravel())
        x_NF = train.difference[:, self.alive].toarray()
        # The strength of the penalty is chosen once, on the unchanged labels, by cross-validation over prompts.
        zero = np.zeros_like(x_NF)
        self.penalty = fit_probe(x_NF, zero, train.prompts, seed).C
        self.scale = x_NF.std(axis=0) + 1e-12
        self.x = (x_NF / self.scale).astype(np.float32)
        self.heldout = {name: (one.difference[:, self.alive].toarray() / self.scale).astype(np.float32) for name, one in heldout.items()}  # fmt: skip

    def fit(self, kept: NDArray[np.int64], sign_N: NDArray[np.float64]) -> NDArray[np.float32]:
        """Weights trained on some pairs, those with sign -1 flipped."""
        return fit_head(self.x[kept] * sign_N[kept, None].astype(np.float32), self.penalty)

    def credits(self, weight_F: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
        """1 for each held-out pair in the right order, by role."""
        return {name: pair_credit((x @ weight_F).astype(np.float64)) for name, x in self.heldout.items()}


def cross_fitted(
    x_ND: NDArray[np.floating], prompts_N: NDArray[Any], sign_N: NDArray[np.float64], seed: int, penalty: float = 1e-3
) -> NDArray[np.float64]:
    """Margins, under the given labels, of linear heads that have not seen the pair's prompt."""
    x_ND = (x_ND / (x_ND.std(axis=0) + 1e-12) * sign_N[:, None]).astype(np.float32)
    margins_N = np.empty(len(x_ND))
    folds = GroupKFold(min(_FOLDS, len(np.unique(prompts_N))), shuffle=True, random_state=seed)
    for fit, test in folds.split(x_ND, groups=prompts_N):
        margins_N[test] = x_ND[test] @ fit_head(x_ND[fit], penalty)
    return margins_N
