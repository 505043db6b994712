"""Edits inside a deep model that cannot be worked out from its codes: their effects on margins by patching, beside the linear approximation.

R responses, N pairs, G sets of latents, the first of them the features and the others matched controls.
patched_RG is the change of a reward when the set's codes are edited and all that follows is computed again; linear_RG is gradient times change.
error = mean |patched - linear| / mean |patched| over responses: 0 where the model is linear between the two, about 1 where the approximation says
nothing. Where it is large, only the patched column is an effect.

Taken apart, the patched change of a response is a sum of terms of the set's latents (integrated gradients, `sarm.passes.path_attribution`) and a
residual, which is what the integral along the path misses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from sarm.audit.codes import AuditCodes
from sarm.audit.steering import BesideControls, against_controls
from sarm.contracts.figures import SPREAD
from sarm.evaluate.intervals import Interval, mean_interval
from sarm.evaluate.statistics import pair_credit


@dataclass(frozen=True)
class PatchedFigures:
    """Margins after an edit of a set's codes, in reward units; accuracies are shares of pairs."""

    patched_ci95: Interval
    """Of `change.value`, over prompts."""
    linear: float
    """The mean change of the margin to first order."""
    linear_share: float | None
    """Linear over patched; None where the latter is 0."""
    error: float | None
    """Mean distance of the two over the mean size of the patched change, over responses; None where nothing changes."""
    correlation: float | None
    """Of the two over responses; None where either is constant."""
    correlation_sets: float | None
    """Of the mean changes of the margin over the sets, controls included: whether the approximation ranks sets rightly."""
    accuracy_before: float
    accuracy_after: float
    change: BesideControls = field(metadata=SPREAD)
    """The mean change of the margin by patching."""


def patched_figures(
    target: AuditCodes,
    patched_RG: Float[np.ndarray, "responses sets"],
    linear_RG: Float[np.ndarray, "responses sets"],
) -> PatchedFigures:
    """What edits do to these pairs; rows are the responses of the codes, of which the pairs' own are read."""
    changes = {name: own[target.chosen] - own[target.rejected] for name, own in (("patched", patched_RG), ("linear", linear_RG))}  # fmt: skip
    own_N, margins_N = changes["patched"][:, 0], target.margins
    mean_G = {name: change_NG.mean(axis=0) for name, change_NG in changes.items()}
    patched_R, linear_R = patched_RG[target.responses, 0], linear_RG[target.responses, 0]
    size = float(np.abs(patched_R).mean())
    value, linear = float(mean_G["patched"][0]), float(mean_G["linear"][0])
    return PatchedFigures(
        patched_ci95=mean_interval(own_N, target.prompts),
        linear=linear,
        linear_share=linear / value if abs(value) > 1e-9 else None,
        error=float(np.abs(patched_R - linear_R).mean()) / size if size > 1e-9 else None,
        correlation=_correlation(patched_R, linear_R),
        correlation_sets=_correlation(mean_G["patched"], mean_G["linear"]),
        accuracy_before=float(pair_credit(margins_N).mean()),
        accuracy_after=float(pair_credit(margins_N + own_N).mean()),
        change=against_controls(value, mean_G["patched"][1:]),
    )


@dataclass(frozen=True)
class TermFigures:
    """The patched change of the margin as a sum over the features, in reward units; shares are of the mean size of a response's patched change."""

    num_pairs: int
    latents: list[int]
    terms: list[float]
    """The mean change of the margin that each latent makes, in the order of `latents`."""
    patched: float
    """The mean change of the margin, of which the terms miss what the residual is."""
    tolerance: float
    residual: float | None
    """Mean size of what a response's terms miss; None where nothing changes."""
    residual_largest: float | None
    within_tolerance: float
    """Share of responses whose residual is at most `tolerance` of the larger of their own change and the mean one."""
    places: int
    """The most places on the path that a response took."""


def term_figures(
    target: AuditCodes,
    latents: Sequence[int],
    patched_R: Float[np.ndarray, " responses"],
    terms_RE: Float[np.ndarray, "responses latents"],
    places_R: Float[np.ndarray, " responses"],
    tolerance: float,
) -> TermFigures:
    """The terms of these pairs; rows are the responses of the codes, of which the pairs' own are read."""
    own = target.responses
    size_R, missed_R = np.abs(patched_R[own]), np.abs(patched_R[own] - terms_RE[own].sum(axis=1))
    size = float(size_R.mean())
    return TermFigures(
        num_pairs=target.num_pairs,
        latents=list(latents),
        terms=(terms_RE[target.chosen] - terms_RE[target.rejected]).mean(axis=0).tolist(),
        patched=float((patched_R[target.chosen] - patched_R[target.rejected]).mean()),
        tolerance=tolerance,
        residual=float(missed_R.mean()) / size if size > 1e-9 else None,
        residual_largest=float(missed_R.max()) / size if size > 1e-9 else None,
        within_tolerance=float((missed_R <= tolerance * np.maximum(size_R, size) + 1e-9).mean()),
        places=int(places_R[own].max()),
    )


def explained_share(codes: AuditCodes) -> float | None:
    """Squared correlation of rewards with the sums of the linear head's terms; None where either is constant."""
    found = _correlation(codes.reward, codes.z @ codes.weight)
    return None if found is None else found**2


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    if len(a) < 3 or min(np.ptp(a), np.ptp(b)) < 1e-12:
        return None
    return float(np.corrcoef(a, b)[0, 1])
