"""What architectures with thresholds share. B batch, N rows of a sample, S d_sae, K active latents a row on average."""

import torch
from torch import Tensor

from .sae import Sae


class ThresholdSae(Sae):
    """z = pre where pre > threshold, else 0: as many latents a row as there are above it. `threshold` is [d_sae]."""

    exported_as = "jumprelu"
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
