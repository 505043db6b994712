"""Dictionaries that spend latents on what decides preferences: the reward's direction is stretched while the SAE learns, then folded away.

x standardised rows, m their centre, u the unit direction of a linear reward. While it learns, the SAE sees
    y = m + (x - m) A,    A = I + (g - 1) u u^T
with g such that u holds a `share` of the variance of y. An SAE reconstructs what varies; A makes it take as much notice of u as if that
were so. Afterwards A goes into the weights, so that the folded SAE reads x, has the codes that it had of y, and reconstructs x:
    W_enc <- A W_enc    W_dec <- W_dec A^-1    b_dec <- m + (b_dec - m) A^-1
Decoder rows are no unit vectors then. B batch, D d_in, S d_sae, N rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sarm.nn.sae import Sae
from sarm.settings.checks import UserError


@dataclass(frozen=True)
class RewardMap:
    """The map A about a centre."""

    centre: Float[Tensor, " d_in"]
    direction: Float[Tensor, " d_in"]
    """Of unit length."""
    stretch: float
    """g, by which differences along the direction are multiplied."""

    def __call__(self, x_ND: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """y of standardised rows."""
        along_N = (x_ND - self.centre.to(x_ND)) @ self.direction.to(x_ND)
        return x_ND + (self.stretch - 1) * torch.outer(along_N, self.direction.to(x_ND))

    @torch.no_grad()
    def fold_(self, sae: Sae) -> None:
        """Make an SAE that learnt from y read and reconstruct x. Its codes of x are those that it had of y.

        Raises UserError for an architecture whose encoder is its decoder's transpose: A cannot go into both.
        """
        if sae.is_tied:
            raise UserError(
                f"a {sae.architecture} SAE encodes with its decoder, so that no direction can be stretched for it. Pass --sae.reward-share 0."
            )
        u_D, centre_D = self.direction.to(sae.W_dec), self.centre.to(sae.W_dec)
        sae.W_enc.add_(torch.outer(u_D, u_D @ sae.W_enc), alpha=self.stretch - 1)
        sae.W_dec.add_(torch.outer(sae.W_dec @ u_D, u_D), alpha=1 / self.stretch - 1)
        offset_D = sae.b_dec - centre_D
        sae.b_dec.copy_(centre_D + offset_D + (1 / self.stretch - 1) * (offset_D @ u_D) * u_D)


def reward_map(x_ND: Float[Tensor, "rows d_in"], direction_D: Float[Tensor, " d_in"], share: float) -> RewardMap:
    """The map that gives a direction this share of all variance, about the mean of the rows.

    `direction_D` may have any length. Raises UserError if the share is not between 0 and 1, or nothing varies along the direction.
    """
    if not 0 < share < 1:
        raise UserError(
            f"the reward's share of the variance must be between 0 and 1, got {share}. Pass --sae.reward-share."
        )
    x_ND = x_ND.double()
    unit_D = direction_D.double() / direction_D.double().norm()
    centre_D = x_ND.mean(0)
    along = float(((x_ND - centre_D) @ unit_D).square().mean())
    total = float((x_ND - centre_D).square().sum(1).mean())
    if not along > 1e-12 * total:
        raise UserError("no row differs from another along the reward's direction. Pass --sae.reward-share 0.")
    stretch = (share / (1 - share) * max(total - along, 0.0) / along) ** 0.5
    # In 64 bits: a direction that is not of unit length would not be undone exactly.
    return RewardMap(centre_D, unit_D, stretch)


def random_direction(d_in: int, seed: int) -> Float[Tensor, " d_in"]:
    """The control: a direction that knows nothing of preferences."""
    return torch.randn(d_in, generator=torch.Generator().manual_seed(seed))
