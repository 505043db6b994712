"""What turns latents, or an activation, into a reward: linear maps in float32. D d_in, K active latents, S d_sae.

RL libraries call a classifier's `score` with the hidden states of its base model; both heads take those as well.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sae import Codes, standardise


class SparseLinear(nn.Module):
    """`weight` [1, S] over sparse codes: a sum of K products. Given hidden states, it encodes them first (`rewards_of`)."""

    rewards_of: Callable[[Tensor], Tensor]

    def __init__(self, d_sae: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, d_sae, dtype=torch.float32))

    def forward(self, codes: Codes | Tensor) -> Tensor:
        if isinstance(codes, Tensor):
            return self.rewards_of(codes)
        return F.embedding_bag(codes.indices, self.weight.T, per_sample_weights=codes.values, mode="sum")


class ScalarHead(nn.Linear):
    """`weight` [1, D] over standardised hidden states, in float32."""

    standardise = True

    def forward(self, hidden: Tensor) -> Tensor:
        h_ND = hidden.reshape(-1, hidden.shape[-1])
        with torch.autocast(hidden.device.type, enabled=False):
            rewards = super().forward(standardise(h_ND) if self.standardise else h_ND.float())
        return rewards.reshape(*hidden.shape[:-1], 1)
