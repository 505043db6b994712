"""Keeps latents from becoming dense while a reward model trains: a latent that fires on most answers tells none of them apart.

    penalty of a response = sum_i e_i z_i / sum_i z_i,      e_i = max(0, 2 f_i - 1)

f_i is the share of recent responses on which latent i fires, so that the penalty is the share of a response's activation that dense
latents (f_i > 1/2) carry, each by how dense it is: between 0 and 1, whatever the scale of the codes. N responses, K active, S d_sae.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

_HALF_LIFE = 512
# Fewer responses do not show what is dense.
_FEWEST = 128


class RecentFiring:
    """How often each latent fired of late: a mean whose weight halves every 512 responses, over all ranks."""

    def __init__(self, d_sae: int):
        self._fired_S = torch.zeros(d_sae, dtype=torch.float64)
        self._weight, self._num_seen = 0.0, 0.0
        self._new_S, self._num_new = torch.zeros(d_sae, dtype=torch.float64), 0

    def see(self, values_NK: Float[Tensor, "responses k"], latents_NK: Int[Tensor, "responses k"]) -> None:
        """Count the responses of a micro-batch; they tell from the next step on."""
        fires = (values_NK.detach() != 0).flatten().double().cpu()
        self._new_S.index_add_(0, latents_NK.flatten().long().cpu(), fires)
        self._num_new += len(values_NK)

    def end_step(self, device: torch.device) -> None:
        """Take in what all ranks have seen in a step; every rank calls it."""
        seen = torch.cat([self._new_S, torch.tensor([float(self._num_new)], dtype=torch.float64)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            seen = seen.to(device)
            dist.all_reduce(seen)
            seen = seen.cpu()
        number = float(seen[-1])
        fade = 0.5 ** (number / _HALF_LIFE)
        self._fired_S = fade * self._fired_S + seen[:-1]
        self._weight, self._num_seen = fade * self._weight + number, self._num_seen + number
        self._new_S.zero_()
        self._num_new = 0

    def excess(self) -> Float[Tensor, " d_sae"]:
        """e of each latent, in [0, 1]; zeros until enough responses have been seen."""
        if self._num_seen < _FEWEST:
            return torch.zeros(len(self._fired_S))
        return (2 * self._fired_S / self._weight - 1).clamp_min(0).float()

    def penalty(
        self, values_NK: Float[Tensor, "responses k"], latents_NK: Int[Tensor, "responses k"]
    ) -> Float[Tensor, " responses"]:
        """Of each response; gradients flow to the values alone."""
        excess_NK = self.excess().to(values_NK.device)[latents_NK.long()]
        size_NK = values_NK.abs()
        return (excess_NK * size_NK).sum(-1) / size_NK.sum(-1).clamp_min(1e-12)

    def state(self) -> dict[str, object]:
        """What later steps depend on; taken between two steps."""
        return {"fired": self._fired_S.tolist(), "weight": self._weight, "num_seen": self._num_seen}

    def load(self, state: dict[str, object]) -> None:
        """Go on after what `state` returned."""
        self._fired_S = torch.tensor(state["fired"], dtype=torch.float64)
        self._weight, self._num_seen = float(str(state["weight"])), float(str(state["num_seen"]))
