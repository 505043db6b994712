"""What a dictionary goes through where its rows change from one kind to another: from sentence ends to chat ends."""

import torch
from jaxtyping import Float

from sarm.evaluate.sae_quality import count_latents
from sarm.nn.sae import Sae

_ROWS_AT_ONCE = 4096


def absorb_phase_shift_(
    sae: Sae, before_ND: Float[torch.Tensor, "before d_in"], after_ND: Float[torch.Tensor, "after d_in"]
) -> None:
    """Take out of the dictionary how far the new rows lie from those before (`Sae.absorb_shift_`); the latent that `before` uses least carries it."""
    unused = int(count_latents(sae, before_ND.split(_ROWS_AT_ONCE)).fired.argmin())
    sae.absorb_shift_(after_ND, unused)
