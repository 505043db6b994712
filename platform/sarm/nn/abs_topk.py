"""AbsTopK (Zhu et al. 2025, arXiv 2510.00404): z = pre for the K latents of largest |pre|, else 0.

One latent holds a direction and its opposite, where TopK needs two. B batch, C rows of a chunk, S d_sae, K active latents a row.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from .sae import Sae
from .selection import Entries, PreActs, Share, is_among_largest, largest
from .topk import TopKSae


class AbsTopKSae(Sae):
    """The K latents of largest |pre| keep their value and its sign."""

    architecture = exported_as = "abs_topk"

    def activate(self, pre_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices_BK = torch.topk(pre_BS.abs(), self.k, dim=-1).indices
        values_BK = pre_BS.gather(-1, indices_BK)
        return values_BK, indices_BK, torch.ones_like(values_BK, dtype=torch.bool)

    @torch.no_grad()
    def unfolded(self) -> TopKSae:
        """The same reconstructions from latents of one meaning each: latent i where it is positive, latent S + i where it is negative."""
        both = TopKSae(self.d_in, 2 * self.d_sae, self.k).to(self.W_dec)
        both.W_enc.copy_(torch.cat([self.W_enc, -self.W_enc], 1))
        both.b_enc.copy_(torch.cat([self.b_enc, -self.b_enc]))
        both.W_dec.copy_(torch.cat([self.W_dec, -self.W_dec]))
        both.b_dec.copy_(self.b_dec)
        both.standardises = self.standardises
        return both

    def rule(self, share: Share) -> "AbsTopKRule":
        return self.aux_rule(self.k, share)

    def aux_rule(self, aux_k: int, share: Share) -> "AbsTopKRule":
        return AbsTopKRule(aux_k, share.latent_group)


class AbsTopKRule:
    """The K of each row that are largest in absolute value; among all workers' latents where `group` splits the dictionary."""

    def __init__(self, k: int, group: dist.ProcessGroup | None = None):
        self._k, self._group = k, group
        self._values: list[Tensor] = []
        self._latents: list[Tensor] = []

    def see(self, pre_CS: Tensor) -> None:
        """Look at a chunk of rows."""
        _, latents_CK = largest(pre_CS.abs(), min(self._k, pre_CS.shape[1]))
        self._values.append(pre_CS.gather(1, latents_CK))
        self._latents.append(latents_CK)

    def entries(self, pre_acts: PreActs) -> Entries:
        values_BK, latents_BK = torch.cat(self._values), torch.cat(self._latents)
        rows = torch.arange(len(values_BK), device=values_BK.device).repeat_interleave(values_BK.shape[1])
        is_on = torch.ones_like(rows, dtype=torch.bool)
        entries = Entries(values_BK.flatten(), latents_BK.flatten(), rows, is_on)
        if self._group is None:
            return entries
        return entries.at(is_among_largest(values_BK.abs(), self._k, self._group).flatten())
