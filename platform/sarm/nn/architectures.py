"""The other architectures, which have thresholds: BatchTopK, Matryoshka BatchTopK, JumpReLU; and the one place that names all.

B batch, S d_sae, K active latents a row on average. Out of training all three keep the latents above `threshold` [d_sae].
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .sae import Codes, Sae, TopKSae

_EMA = 0.99


class ThresholdSae(Sae):
    """z = pre where pre > threshold, else 0: as many latents a row as there are above it."""

    threshold: Tensor

    def activate(self, pre_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        is_above_BS = pre_BS > self.threshold
        width = max(1, int(is_above_BS.sum(1).max())) if len(pre_BS) else 1
        values_BK, indices_BK = pre_BS.masked_fill(~is_above_BS, -torch.inf).topk(width, dim=-1)
        is_on_BK = values_BK > -torch.inf
        return values_BK.masked_fill(~is_on_BK, 0.0), indices_BK, is_on_BK

    @torch.no_grad()
    def calibrate_(self, x_ND: Tensor) -> None:
        """One threshold for all latents, above which K of them lie on average over the sample's first 256 rows."""
        pre_NS = torch.addmm(self.b_enc, x_ND[:256].to(self.W_enc.dtype) - self.b_dec, self.W_enc)
        kept = min(self.k * len(pre_NS), pre_NS.numel() - 1)
        # The value just below the smallest that is kept, and never negative.
        lowest = pre_NS.flatten().topk(kept + 1).values[-1]
        self.threshold.fill_(lowest.clamp_min(0.0))


class BatchTopKSae(ThresholdSae):
    """K * B latents of the batch in training (Bussmann et al. 2024); their smallest value, averaged over steps, is `threshold`."""

    architecture = "batch_topk"

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__(d_in, d_sae, k)
        self.register_buffer("threshold", torch.zeros(d_sae, dtype=torch.float32))

    @torch.no_grad()
    def follow_(self, smallest: float | None) -> None:
        """Move the threshold towards the smallest value that a step kept; None if it kept nothing."""
        if smallest is not None:
            self.threshold.lerp_(torch.full_like(self.threshold, smallest), 1 - _EMA)


class MatryoshkaSae(BatchTopKSae):
    """BatchTopK whose first latents are dictionaries of their own, of sizes `prefixes` (Bussmann et al. 2025).

    Training sums the reconstruction losses of all nested dictionaries, so that general features come first.
    """

    architecture = "matryoshka"

    def __init__(self, d_in: int, d_sae: int, k: int, prefixes: Sequence[int] = ()):
        super().__init__(d_in, d_sae, k)
        # Each half of the next, as long as it can hold the active latents of a row.
        self.prefixes = tuple(prefixes) or tuple(d_sae >> n for n in (4, 3, 2, 1) if d_sae >> n >= max(1, k))
        if list(self.prefixes) != sorted(set(self.prefixes)) or any(not 0 < p < d_sae for p in self.prefixes):
            raise ValueError(
                f"prefixes must rise and lie between 1 and d_sae - 1, got {self.prefixes}. Pass --sae.prefixes."
            )


class JumpReluSae(ThresholdSae):
    """Every latent learns its own threshold by straight-through gradients of width `bandwidth` (Rajamanoharan et al. 2024).

    Thresholds start where K latents a row are active; `l0_penalty` times (l0 / K - 1)^2 is added to the loss to keep it so.
    """

    architecture = "jumprelu"

    def __init__(self, d_in: int, d_sae: int, k: int, bandwidth: float = 0.1, l0_penalty: float = 1.0):
        super().__init__(d_in, d_sae, k)
        self.bandwidth, self.l0_penalty = bandwidth, l0_penalty
        self.threshold = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))


class DenseSae(Sae):
    """z = pre, all of it: what is left of an SAE without its TopK (the papers' "woTopK"); not trained as a dictionary.

    A reward on it is linear in the activation.
    """

    architecture = "dense"

    def encode(self, x: Tensor) -> Codes:
        with torch.autocast(x.device.type, enabled=False):
            # A product for the backward pass too: nothing is sparse here that gathering active rows could save.
            values, indices, _ = self.activate(torch.addmm(self.b_enc, x.to(self.W_enc.dtype) - self.b_dec, self.W_enc))
        return Codes(values, indices)

    def activate(self, pre_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every latent, by index."""
        return pre_BS, torch.arange(self.d_sae, device=pre_BS.device).expand_as(pre_BS), torch.ones_like(pre_BS).bool()

    def decode(self, codes: Codes) -> Tensor:
        return codes.values @ self.W_dec + self.b_dec


ARCHITECTURES: dict[str, type[Sae]] = {c.architecture: c for c in (TopKSae, BatchTopKSae, MatryoshkaSae, JumpReluSae)}
_OPTIONS: dict[str, tuple[str, ...]] = {
    "topk": ("signed",),
    "batch_topk": (),
    "matryoshka": ("prefixes",),
    "jumprelu": ("bandwidth", "l0_penalty"),
}


def build_sae(architecture: str, d_in: int, d_sae: int, k: int, **options: Any) -> Sae:
    """An SAE of the named architecture; options that it does not have are ignored."""
    if architecture == DenseSae.architecture:
        return DenseSae(d_in, d_sae, k)
    known = {name: value for name, value in options.items() if name in _OPTIONS[architecture]}
    return ARCHITECTURES[architecture](d_in, d_sae, k, **known)


def options_of(sae: Sae) -> dict[str, Any]:
    """What `build_sae` needs besides the sizes to make the same SAE again, as JSON values."""
    values = {name: getattr(sae, name) for name in _OPTIONS.get(sae.architecture, ())}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
