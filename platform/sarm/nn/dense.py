"""What is left of an SAE without its TopK: a linear map with a bias. B batch, S d_sae."""

import torch
from torch import Tensor

from .sae import Codes, Sae


class DenseSae(Sae):
    """z = pre, all of it (the papers' "woTopK"); not trained as a dictionary. A reward on it is linear in the activation."""

    architecture = exported_as = "dense"

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
