"""Some latents of an SAE scaled in the residual stream; what the SAE does not explain is passed on as it is.

change(h) = s sum over edited latents i of (a - 1) z_i d_i, so that h + change(h) = h + s (decode(z') - decode(z)) with z'_i = a z_i for the edited
ones. a = 0 removes them. z are the codes of h, d_i is row i of W_dec; s is the token's own deviation plus 1e-6 where the SAE standardises, else 1.
Both decodings leave out the same, so that a = 1 changes nothing.
N tokens, D d_in, K active latents.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .sae import STANDARDISE_EPS, Codes, Sae


class ScaledCodes:
    """These latents times a factor, at every token that is asked for. Raises ValueError for a latent that the SAE lacks."""

    def __init__(self, sae: Sae, latents: Sequence[int], factor: float):
        if wrong := [latent for latent in latents if not 0 <= latent < sae.d_sae]:
            raise ValueError(f"latent {wrong[0]} is none of the SAE's {sae.d_sae}. Pass latents from 0 on.")
        self._sae = sae
        self._step_S = torch.zeros(sae.d_sae, device=sae.W_dec.device)
        self._step_S[list(latents)] = factor - 1.0

    @torch.no_grad()
    def change(self, h_ND: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """What is added to activations, in float32."""
        h_ND = h_ND.float()
        codes: Codes = self._sae(self._sae.rows_of(h_ND))
        steps_NK = codes.values * self._step_S[codes.indices]
        change_ND: Tensor = F.embedding_bag(codes.indices, self._sae.W_dec, per_sample_weights=steps_NK, mode="sum")
        return change_ND * (h_ND.std(-1, keepdim=True) + STANDARDISE_EPS) if self._sae.standardises else change_ND
