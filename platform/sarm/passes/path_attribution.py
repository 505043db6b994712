"""Integrated gradients of a reward by the features that an edit changes, on the straight path from the activations as they are to the edited ones.

c_t = sum_i a_ti d_i     change of token t's activation h_t: d_i row i of W_dec, a_ti the step of latent i in the residual's units (`Splice.steps`)
g_t(u) = dr / dh_t       at h + u c, everything behind the layer computed again
T_i = sum_t a_ti d_i . integral from 0 to 1 of g_t(u) du          (Sundararajan et al. 2017, with the edit's features as the inputs)
completeness             sum_i T_i = r(h + c) - r(h), which is the effect by patching

The integral is a sum over Gauss-Legendre places. Their number is doubled from 16 on until the terms add up to the effect by patching, within the
tolerance: a reward that bends smoothly needs few, one with kinks (a head with ReLU) hundreds, as a sum misses a kink by about a part in the number
of places. What is left is the residual, which is reported and never spread over the terms.
B rows, L columns, D d_in, E edited latents.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sarm.nn.splice import Splice
from sarm.passes.attached_model import AttachedModel
from sarm.passes.reward_gradients import Conversations, gradients, reward_at

FEWEST, MOST = 16, 512
TOLERANCE = 0.01
"""Largest residual of a row, in its effect by patching, or in the mean effect of its batch where its own is smaller."""


class PathTerms(NamedTuple):
    """Of each row the effect by patching [B], the terms of the edited latents [B, E], and how many places they are sums over [B]."""

    effect: Float[Tensor, " rows"]
    terms: Float[Tensor, "rows edited"]
    places: Int[Tensor, " rows"]

    @property
    def residual(self) -> Float[Tensor, " rows"]:
        """What the terms miss of the effect."""
        return self.effect - self.terms.sum(1)


def path_terms(
    model: AttachedModel,
    batch: Conversations,
    splice: Splice,
    places_BL: Bool[Tensor, "rows columns"],
    fewest: int = FEWEST,
    most: int = MOST,
    tolerance: float = TOLERANCE,
) -> PathTerms:
    """The terms of an edit at these tokens. Rows whose terms do not add up with `most` places keep their last ones, and their residual."""
    reward_B, h_BLD, _ = gradients(model, batch)
    steps_BLE = splice.steps(h_BLD.flatten(0, 1)).unflatten(0, h_BLD.shape[:2]) * places_BL[..., None]
    directions_ED = splice.directions.to(steps_BLE)
    change_BLD = steps_BLE @ directions_ED
    after_B, _ = reward_at(model, batch, h_BLD + change_BLD, needs_slope=False)
    effect_B = (after_B - reward_B).double()
    terms_BE = torch.zeros(len(effect_B), len(directions_ED), dtype=torch.float64, device=effect_B.device)
    num_B = torch.zeros(len(effect_B), dtype=torch.long, device=effect_B.device)
    scale_B = torch.maximum(effect_B.abs(), effect_B.abs().mean())
    open_R, num = torch.arange(len(effect_B), device=effect_B.device), fewest
    while len(open_R) and num <= most:
        slope_RLD = _mean_slope(model, _rows(batch, open_R), h_BLD[open_R], change_BLD[open_R], num)
        terms_BE[open_R] = (steps_BLE[open_R].double() * (slope_RLD @ directions_ED.double().T)).sum(1)
        num_B[open_R] = num
        missed_R = (effect_B[open_R] - terms_BE[open_R].sum(1)).abs()
        open_R = open_R[missed_R > tolerance * scale_B[open_R]]
        num *= 2
    return PathTerms(effect_B, terms_BE, num_B)


def path_places(num: int) -> Sequence[tuple[float, float]]:
    """(place, weight) of the Gauss-Legendre sum over 0 to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return [(float(node + 1) / 2, float(weight) / 2) for node, weight in zip(nodes, weights, strict=True)]


def _mean_slope(model: AttachedModel, batch: Conversations, h_BLD: Tensor, change_BLD: Tensor, num: int) -> Tensor:
    """The integral of the gradient over the path, in float64."""
    total_BLD = torch.zeros(h_BLD.shape, dtype=torch.float64, device=h_BLD.device)
    for place, weight in path_places(num):
        _, slope_BLD = reward_at(model, batch, h_BLD + place * change_BLD)
        total_BLD.add_(slope_BLD.double(), alpha=weight)
    return total_BLD


def _rows(batch: Conversations, rows: Tensor) -> Conversations:
    gates = None if batch.gates is None else batch.gates[rows]
    return Conversations(batch.input_ids[rows], batch.last[rows], gates)
