"""Which latents of which rows a sparse product reads, and how the entries of a latent are dealt out.

N entries, S d_sae, P pieces.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Bags(NamedTuple):
    """Entries grouped into bags, each bag the sum of values[n] * W_dec[latents[n]]: one bag a row and nested dictionary."""

    latents: Tensor
    rows: Tensor
    bags: Tensor
    offsets: Tensor


class Pieces(NamedTuple):
    """Entries `starts[p]` up to `stops[p]`, of entries sorted by latent, are added up into row `targets[p]` of `num_targets`.

    A latent's first piece goes to the row of its number. Its further pieces go to rows S + `more[latent]` up to S + `more[latent + 1]`. The last
    row takes what stands for nothing.
    """

    starts: Tensor
    stops: Tensor
    targets: Tensor
    more: Tensor
    num_targets: int


def pieces_of(latents_N: Tensor, num_latents: int, size: int) -> Pieces:
    """Pieces of at most `size` entries of one latent each, at least one a latent; of sorted latents.

    There are as many as there could be, so that the number need not be asked of the device.
    """
    device, num_entries = latents_N.device, len(latents_N)
    every = torch.arange(num_latents + 1, device=device)
    starts_S = torch.searchsorted(latents_N, every)
    further_S = ((starts_S.diff() - 1) // size).clamp_min(0)
    more = torch.zeros(num_latents + 1, dtype=torch.int64, device=device)
    torch.cumsum(further_S, 0, out=more[1:])
    # Of N entries, at most N // size pieces are not the first of their latent.
    most = num_entries // size
    place_M = torch.arange(most, device=device)
    owner_M = torch.searchsorted(more, place_M, right=True) - 1
    is_one_M = owner_M < num_latents
    owner_M = owner_M.clamp_max(num_latents - 1)
    start_M = starts_S[owner_M] + (1 + place_M - more[owner_M]) * size
    stop_M = torch.minimum(start_M + size, starts_S[owner_M + 1])
    return Pieces(
        starts=torch.cat([starts_S[:-1], torch.where(is_one_M, start_M, 0)]),
        stops=torch.cat([torch.minimum(starts_S[:-1] + size, starts_S[1:]), torch.where(is_one_M, stop_M, 0)]),
        targets=torch.cat([every[:-1], torch.where(is_one_M, num_latents + place_M, num_latents + most)]),
        more=more,
        num_targets=num_latents + most + 1,
    )
