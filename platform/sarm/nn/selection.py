"""Which latents are active in a training step, decided from pre-activations that are seen one chunk of rows at a time.

B rows, S latents (of this worker, where the dictionary is split), K active latents a row, N entries: one for each active latent
of each row. A rule never keeps a B x S tensor; what it keeps does not grow with S.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

# Pre-activations of some rows, by their numbers: for the few rows that a rule has to look at again.
PreActs = Callable[[Tensor], Tensor]
BLOCK = 16


class Share(NamedTuple):
    """What one worker sees of a training step: `num_rows` of its `num_all_rows`, or all of them where latents are dealt instead."""

    num_rows: int
    num_all_rows: int
    group: dist.ProcessGroup | None = None
    """All workers; None for a single one."""
    splits_latents: bool = False

    @property
    def latent_group(self) -> dist.ProcessGroup | None:
        """Workers over which the dictionary is split."""
        return self.group if self.splits_latents else None

    @property
    def num_row_workers(self) -> int:
        """Workers over which rows are dealt."""
        return 1 if self.splits_latents or self.group is None else dist.get_world_size(self.group)

    def over_rows(self, value: Tensor) -> Tensor:
        """The sum over workers that have different rows."""
        if self.num_row_workers > 1:
            value = value.clone()
            dist.all_reduce(value, group=self.group)
        return value


class Entries(NamedTuple):
    """Active latents, row after row.

    `is_on` says where the gradient passes to the pre-activation, `is_edge` where it passes to the latent's threshold.
    """

    values: Tensor
    latents: Tensor
    rows: Tensor
    is_on: Tensor
    is_edge: Tensor | None = None

    def at(self, places: Tensor) -> "Entries":
        """The entries at these places, or where this mask is true."""
        edge = None if self.is_edge is None else self.is_edge[places]
        return Entries(
            values=self.values[places],
            latents=self.latents[places],
            rows=self.rows[places],
            is_on=self.is_on[places],
            is_edge=edge,
        )


class Reconstruction(NamedTuple):
    """`x_hat` [G, B, D] of each nested dictionary, the whole one last; `error_hat` [B, D], what AuxK makes of the error, or None.

    `l0` [B] is differentiable with respect to thresholds; `entries` are not.
    """

    x_hat: Tensor
    error_hat: Tensor | None
    l0: Tensor
    entries: Entries


@runtime_checkable
class Rule(Protocol):
    """One step's selection: `see` every chunk in order, then `entries`."""

    def see(self, pre_CS: Tensor) -> None: ...

    def entries(self, pre_acts: PreActs) -> Entries: ...


class LargestRule:
    """A rule that needs no more of a row than its `width` largest: they may be given to `take` in place of the row to `see`."""

    def __init__(self, width: int):
        self.width = width
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._num_latents = 0

    def see(self, pre_CS: Tensor) -> None:
        """Look at a chunk of rows."""
        num_latents = pre_CS.shape[1]
        self.take(*largest(pre_CS, min(self.width, num_latents)), num_latents)

    def take(self, values_CW: Tensor, latents_CW: Tensor, num_latents: int) -> None:
        """The largest of each row of a chunk, by descending value, among this many latents."""
        self._num_latents = num_latents
        self._seen.append((values_CW, latents_CW))


class TopKRule(LargestRule):
    """The K largest of each row, ReLU'd unless `signed`; among all workers' latents where `group` splits the dictionary."""

    def __init__(self, num_rows: int, k: int, signed: bool = False, group: dist.ProcessGroup | None = None):
        super().__init__(k)
        self._num_rows, self._k, self._signed, self._group = num_rows, k, signed, group

    def entries(self, pre_acts: PreActs) -> Entries:
        values_BK, latents_BK = (torch.cat(part) for part in zip(*self._seen, strict=True))
        is_mine = None
        if self._group is not None:
            is_mine = is_among_largest(values_BK, self._k, self._group)
        is_on = torch.ones_like(values_BK, dtype=torch.bool) if self._signed else values_BK > 0
        values = values_BK if self._signed else values_BK.relu()
        rows = torch.arange(self._num_rows, device=values.device).repeat_interleave(values.shape[1])
        found = Entries(values.flatten(), latents_BK.flatten(), rows, is_on.flatten())
        return found if is_mine is None else found.at(is_mine.flatten())


def largest(pre_CS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k largest of each row, by descending value, exactly; where the width allows, faster than `topk`.

    Each of the k largest lies in one of the k blocks of 16 whose maxima are largest, so that one pass for the maxima and a
    search of 16 k candidates are enough. Of equal values at the end any may be taken, as by `topk`.
    """
    num_latents = pre_CS.shape[1]
    if num_latents % BLOCK or num_latents // BLOCK < 4 * k:
        top = torch.topk(pre_CS, k, dim=1)
        return top.values, top.indices
    return largest_by_blocks(pre_CS, k)


def largest_by_blocks(pre_CS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`largest` where the latents are whole blocks, k of them or more; 16-bit values are searched, and returned, as float32."""
    num_blocks = pre_CS.shape[1] // BLOCK
    dtype = torch.float32 if pre_CS.element_size() < 4 else pre_CS.dtype
    found = []
    # On a CPU, rows that fit in its cache.
    for part in pre_CS.split(256 if pre_CS.device.type == "cpu" else len(pre_CS) or 1):
        # Block j is every num_blocks-th latent from j on, so that maxima are taken of whole vectors.
        blocks = part.view(len(part), BLOCK, num_blocks)
        chosen = torch.topk(blocks.amax(1).to(dtype), k, dim=1, sorted=False).indices
        candidates = blocks.gather(2, chosen[:, None, :].expand(-1, BLOCK, -1)).flatten(1)
        top = torch.topk(candidates.to(dtype), k, dim=1)
        indices = top.indices // k * num_blocks + chosen.gather(1, top.indices % k)
        found.append((top.values, indices))
    values, indices = (torch.cat(part) for part in zip(*found, strict=True))
    return values, indices


def is_among_largest(values_BK: Tensor, k: int, group: dist.ProcessGroup) -> Tensor:
    """Whether each of this worker's candidates is among the k largest of its row over all workers: one all-gather of B x K values.

    Workers may have fewer than k candidates a row. Equal values are told apart by worker, so exactly k are taken.
    """
    padded = values_BK.new_full((len(values_BK), k), -torch.inf)
    padded[:, : values_BK.shape[1]] = values_BK
    everyone = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, padded, group=group)
    places = torch.topk(torch.cat(everyone, dim=1), k, dim=1).indices
    is_kept = torch.zeros(len(padded), k * len(everyone), dtype=torch.bool, device=padded.device).scatter_(
        1, places, True
    )
    first = dist.get_rank(group) * k
    return is_kept[:, first : first + values_BK.shape[1]]


def all_gather_uneven(values_N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All workers' values in the workers' order; each may have another number of them."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=values_N.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([len(values_N)], device=values_N.device), group=group)
    padded = values_N.new_zeros(max(int(size) for size in sizes))
    padded[: len(values_N)] = values_N
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded, group=group)
    return torch.cat([part[: int(size)] for part, size in zip(everyone, sizes, strict=True)])
