"""What a step of reward training minimises. P pairs of a micro-batch, N rewarded tokens.

L = mean over pairs of  BT(r_c - r_r - margin)  +  centre_weight (r_c + r_r)^2  +  recon_weight (NMSE_c + NMSE_r) / 2
                        +  dense_weight (D_c + D_r) / 2,
NMSE the SAE's reconstruction loss at a response's rewarded token (SARM equations 3 and 5), D `dense_latents`' penalty. A sum over pairs, so that it does not
depend on how they are cut into micro-batches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sarm.nn.losses import bradley_terry, reward_centring
from sarm.settings.reward import RewardSettings
from sarm.training.dense_latents import RecentFiring


class Objective(NamedTuple):
    """The objective's weights; the defaults are the papers' plain Bradley-Terry."""

    label_smoothing: float = 0.0
    use_margin: bool = True
    centre_weight: float = 0.0
    recon_weight: float = 0.0
    recon_detached: bool = True
    dense_weight: float = 0.0

    def model_options(self) -> dict[str, Any]:
        """What the model's forward must be told."""
        return {"reconstruct": True, "recon_detached": self.recon_detached} if self.recon_weight else {}

    def __call__(
        self,
        output: Any,
        chosen: Sequence[int],
        rejected: Sequence[int],
        required: Sequence[float | None],
        firing: RecentFiring | None = None,
    ) -> Float[Tensor, " pairs"]:
        """Losses [P] of the pairs whose rewards stand at `chosen` and `rejected` of the output; `required` are their margins, if any.

        `firing` says which latents are dense; a head without latents has none.
        """
        reward_N = output.logits.squeeze(-1)
        chosen_P, rejected_P = reward_N[list(chosen)], reward_N[list(rejected)]
        wanted_P = chosen_P - rejected_P
        if self.use_margin and any(margin is not None for margin in required):
            wanted_P = wanted_P - torch.tensor([margin or 0.0 for margin in required]).to(wanted_P)
        losses_P = bradley_terry(wanted_P, self.label_smoothing)
        if self.centre_weight:
            losses_P = losses_P + self.centre_weight * reward_centring(chosen_P, rejected_P)
        if self.recon_weight:
            recon_N = output.reconstruction_loss
            losses_P = losses_P + self.recon_weight * (recon_N[list(chosen)] + recon_N[list(rejected)]) / 2
        if self.dense_weight and firing is not None and output.latent_values is not None:
            dense_N = firing.penalty(output.latent_values, output.latent_indices)
            losses_P = losses_P + self.dense_weight * (dense_N[list(chosen)] + dense_N[list(rejected)]) / 2
        return losses_P


def objective_of(config: RewardSettings) -> Objective:
    """The objective that the settings ask for."""
    return Objective(
        label_smoothing=config.label_smoothing,
        use_margin=config.use_margin,
        centre_weight=config.centre_weight,
        recon_weight=config.recon_weight,
        recon_detached=config.recon_detached,
        dense_weight=config.dense_weight,
    )
