"""Every registered SAE architecture, and its definition once more, densely: a new one adds its own to `DEFINITIONS`.

B batch, D d_in, S d_sae, K active latents a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sarm.nn.abs_topk import AbsTopKSae
from sarm.nn.architectures import ARCHITECTURES, OPTIONS, build_sae
from sarm.nn.sae import Sae
from sarm.settings.sae import SaeSettings

KINDS = [*ARCHITECTURES, "signed"]
"""The registry, and the one option that changes a rule."""


def kind_of(name: str) -> dict[str, Any]:
    """Settings of a kind."""
    return {"architecture": "topk", "signed": True} if name == "signed" else {"architecture": name}


def sae_of_settings(settings: SaeSettings, d_in: int) -> Sae:
    options = {name: getattr(settings, name) for name in OPTIONS}
    return build_sae(settings.architecture, d_in, settings.d_sae, settings.k, **options)


@torch.no_grad()
def silence_(sae: Sae, num: int) -> None:
    """Make the first latents so weak that they are hardly ever active, on standardised rows, and yet have gradients for AuxK."""
    if sae.is_tied:
        # Standardised rows have no mean, so hardly anything of them lies along this direction.
        sae.W_dec[:num] = torch.nn.functional.normalize(1 + 0.3 * sae.W_dec[:num], dim=1)
    elif isinstance(sae, AbsTopKSae):
        sae.W_enc[:, :num] *= 0.02
    else:
        sae.b_enc[:num] = -3.0


class Rectangle(torch.autograd.Function):
    """H(pre - threshold) with a rectangle in place of the delta in its gradient to the threshold, dense."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.width / 2).to(pre.dtype)
        return None, -(grad * near / ctx.width).sum(0), None


def pre_acts(sae: Sae, x: Tensor) -> Tensor:
    return (x - sae.b_dec) @ sae.W_enc + sae.b_enc


def kept(pre: Tensor, by: Tensor, k: int) -> Tensor:
    """`pre` where `by` is among the k largest of its row, else 0."""
    return pre * torch.zeros_like(pre).scatter(1, by.topk(min(k, pre.shape[1]), dim=1).indices, 1.0)


def _topk(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    pre = pre_acts(sae, x)
    z = kept(pre, pre, sae.k)
    z = z if sae.signed else z.relu()
    return z, (z != 0).to(z.dtype)


def _batch_topk(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    pre = pre_acts(sae, x).relu()
    z = kept(pre.view(1, -1), pre.view(1, -1), sae.k * len(x)).view_as(pre)
    return z, (z != 0).to(z.dtype)


def _jumprelu(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    pre = pre_acts(sae, x)
    gates = Rectangle.apply(pre, sae.threshold, sae.bandwidth)
    # The gradient of pre * H to the threshold is -threshold / width inside the rectangle, hence threshold, not pre.
    return pre * gates.detach() + sae.threshold.detach() * (gates - gates.detach()), gates


def _abs_topk(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    pre = pre_acts(sae, x)
    z = kept(pre, pre.abs(), sae.k)
    return z, (z != 0).to(z.dtype)


def _matching_pursuit(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    rest = x - sae.b_dec
    z = torch.zeros(len(x), sae.d_sae, dtype=x.dtype)
    for _ in range(sae.k):
        projected = (rest @ sae.W_dec.T).relu()
        step = kept(projected, projected, 1)
        z, rest = z + step, rest - step @ sae.W_dec
    return z, (z != 0).to(z.dtype)


DEFINITIONS: dict[str, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    "topk": _topk,
    "batch_topk": _batch_topk,
    "matryoshka": _batch_topk,
    "jumprelu": _jumprelu,
    "abs_topk": _abs_topk,
    "matching_pursuit": _matching_pursuit,
}
"""(z_BS, is active_BS) of a training step, by plain autograd."""


def auxk_by_definition(sae: Sae, x: Tensor, z: Tensor, dead: list[int], aux_k: int) -> Tensor:
    """What the strongest `aux_k` dead latents make of the rows, or, where latents are tied, of what is left of them."""
    rest = (x - z @ sae.W_dec - sae.b_dec).detach()
    pre = (rest @ sae.W_dec.T if sae.is_tied else pre_acts(sae, x))[:, dead]
    z_dead = kept(pre, pre.abs(), aux_k) if isinstance(sae, AbsTopKSae) else kept(pre, pre, aux_k).relu()
    return z_dead @ sae.W_dec[dead]
