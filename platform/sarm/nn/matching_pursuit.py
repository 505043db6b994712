"""MP-SAE, an encoder that unrolls matching pursuit (Costa et al. 2025, arXiv 2506.03093): K greedy steps in place of one product.

r = x - b_dec;  K times:  i = argmax_i <r, w_i>,  z_i += relu(<r, w_i>),  r -= relu(<r, w_i>) w_i;  x_hat = x - r.
w_i is row i of W_dec, of unit norm: encoder and decoder are one matrix, and there is no b_enc. Each step looks for what those
before it have left, so that latents may be active together whose directions resemble each other. A step costs as much as the
whole encoder of TopK. B batch, D d_in, S d_sae, K steps, and active latents a row at most.
"""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from .precision import deciding
from .sae import Codes, Sae
from .selection import Entries, Reconstruction, Share

# Projections at once: no tensor is B x S.
_PROJECTIONS_AT_ONCE = 2**24


class MatchingPursuitSae(Sae):
    """K steps of matching pursuit over unit directions; a latent that is chosen twice adds up."""

    architecture = exported_as = "matching_pursuit"
    is_tied: ClassVar[bool] = True

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override]  # noqa: N802
        """[d_in, d_sae], the decoder's transpose."""
        return self.W_dec.T

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        """[d_sae] zeros."""
        return self.W_dec.new_zeros(self.d_sae)

    def initialise_encoder_(self, x_ND: Tensor) -> None:
        """Nothing: it is the decoder, and each projection is already the best length of its direction."""

    def encode(self, x: Tensor) -> Codes:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W_dec.dtype)
            values, latents, _ = _Pursue.apply(x - self.b_dec, self.W_dec, self.k, None)
            return _codes(values, latents)

    def activate(self, pre_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError("matching pursuit is no function of one set of pre-activations. Call `encode`.")

    def rule(self, share: Share) -> None:
        """None: a step reconstructs by `pursue`."""

    def pursue(self, x_BD: Tensor, share: Share) -> tuple[Reconstruction, Tensor]:
        """The reconstruction of a training step, without AuxK, and what is left of the rows [B, D]."""
        values, latents, rest_BD = _Pursue.apply(x_BD - self.b_dec, self.W_dec, self.k, share.latent_group)
        codes = _codes(values.detach(), latents)
        is_on_BK = codes.values != 0
        rows_N, places_N = is_on_BK.nonzero(as_tuple=True)
        l0_B = is_on_BK.sum(1).to(x_BD.dtype)
        if share.latent_group is not None:
            dist.all_reduce(l0_B, group=share.latent_group)
        entries = Entries(codes.values[rows_N, places_N], codes.indices[rows_N, places_N], rows_N, is_on_BK[is_on_BK])
        return Reconstruction((x_BD - rest_BD)[None], None, l0_B, entries), rest_BD

    @torch.no_grad()
    def absorb_shift_(self, rows_ND: Tensor, latent: int) -> None:
        """Take the shift's direction out of all latents but the one that carries it: codes of the others do not see it."""
        unit_D = self._shift_direction(rows_ND)
        self.W_dec.sub_(torch.outer(self.W_dec @ unit_D, unit_D))
        self.W_dec[latent] = unit_D
        self.normalise_decoder_()


class _Pursue(torch.autograd.Function):
    """Values and latents of each step [B, K], and what is left of the rows [B, D].

    Where `group` splits the dictionary, a step's value is 0 on the workers that do not hold its latent. For the backward pass a
    row's earlier remainders are not kept but made again from the last: r_(k-1) = r_k + z_k w_k.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_SD: Tensor, k: int, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rest_BD = x_BD.clone()
        values, latents = [], []
        for _ in range(k):
            value_B, latent_B = _nearest(rest_BD, W_SD)
            if group is not None:
                value_B = _of_the_owner(value_B, group)
            rest_BD -= _summed(value_B[:, None] * W_SD[latent_B], group)
            values.append(value_B)
            latents.append(latent_B)
        values_BK, latents_BK = torch.stack(values, 1), torch.stack(latents, 1)
        ctx.save_for_backward(rest_BD, W_SD, values_BK, latents_BK)
        ctx.group = group
        ctx.mark_non_differentiable(latents_BK)
        return values_BK, latents_BK, rest_BD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rest_BD, W_SD, values_BK, latents_BK = ctx.saved_tensors
        grad_values_BK, _, grad_rest_BD = grads
        grad_W_SD = torch.zeros_like(W_SD) if ctx.needs_input_grad[1] else None
        rest_BD, grad_rest_BD = rest_BD.clone(), grad_rest_BD.clone()
        for step in reversed(range(values_BK.shape[1])):
            value_B1, latent_B = values_BK[:, step, None], latents_BK[:, step]
            w_BD = W_SD[latent_B]
            grad_B1 = grad_values_BK[:, step, None] - (grad_rest_BD * w_BD).sum(1, keepdim=True)
            # Nothing passes where no direction was near, or another worker's was nearest.
            grad_B1 = grad_B1 * (value_B1 > 0)
            rest_BD += _summed(value_B1 * w_BD, ctx.group)
            if grad_W_SD is not None:
                # By `index_put_`, which on CUDA adds in a fixed order.
                grad_W_SD.index_put_((latent_B,), grad_B1 * rest_BD - value_B1 * grad_rest_BD, accumulate=True)
            grad_rest_BD += _summed(grad_B1 * w_BD, ctx.group)
        return grad_rest_BD, grad_W_SD, None, None


def _nearest(rest_BD: Tensor, W_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the largest projection, 0 if none is positive, and its latent."""
    with deciding():
        parts = [(rows @ W_SD.T).max(1) for rows in rest_BD.split(max(1, _PROJECTIONS_AT_ONCE // len(W_SD)))]
    return torch.cat([part.values for part in parts]).clamp_min(0.0), torch.cat([part.indices for part in parts])


def _of_the_owner(value_B: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The value where it is the largest of all workers' (of equal ones, one), else 0."""
    everyone = [torch.empty_like(value_B) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, value_B.contiguous(), group=group)
    return value_B * (torch.stack(everyone).max(0).indices == dist.get_rank(group))


def _summed(update_BD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(update_BD, group=group)
    return update_BD


def _codes(values_BK: Tensor, latents_BK: Tensor) -> Codes:
    """Steps as codes: a latent's values added up in the place of its first step, places by descending value."""
    first = [(latents_BK[:, : k + 1] == latents_BK[:, k, None]).int().argmax(1) for k in range(latents_BK.shape[1])]
    added_BK = torch.zeros_like(values_BK).scatter_add(1, torch.stack(first, 1), values_BK)
    ordered = added_BK.sort(dim=1, descending=True, stable=True)
    return Codes(ordered.values, latents_BK.gather(1, ordered.indices))
