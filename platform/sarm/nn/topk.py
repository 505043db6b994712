"""TopK (Makhzani and Frey 2014; Gao et al. 2024): z = relu(TopK(pre)). B batch, S d_sae, K active latents a row."""

import torch
from torch import Tensor

from .sae import Sae
from .selection import Share, TopKRule


class TopKSae(Sae):
    """z = relu(TopK(pre)); with `signed`, z = TopK(pre), as in the papers' own code, where negative latents may survive."""

    architecture = exported_as = "topk"
    options = ("signed",)

    def __init__(self, d_in: int, d_sae: int, k: int, signed: bool = False):
        super().__init__(d_in, d_sae, k)
        self.signed = signed
        if signed:
            self.exported_as = "signed_topk"

    def activate(self, pre_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top_BK, indices_BK = torch.topk(pre_BS, self.k, dim=-1)
        if self.signed:
            return top_BK, indices_BK, torch.ones_like(top_BK, dtype=torch.bool)
        # Latents of value 0 are off: relu's gradient is 0 there, also when fewer than K pre-activations are positive.
        return top_BK.relu(), indices_BK, top_BK > 0

    def rule(self, share: Share) -> TopKRule:
        return TopKRule(share.num_rows, self.k, self.signed, share.latent_group)
