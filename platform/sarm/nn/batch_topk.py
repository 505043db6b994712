"""BatchTopK (Bussmann et al. 2024) and Matryoshka BatchTopK (Bussmann et al. 2025).

B batch, S d_sae, K active latents a row on average. Out of training both keep the latents above `threshold` [d_sae].
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .selection import Entries, LargestRule, PreActs, Rule, Share, all_gather_uneven
from .thresholds import ThresholdSae

_EMA = 0.99


class BatchTopKSae(ThresholdSae):
    """K * B latents of the batch in training; their smallest value, averaged over steps, is `threshold`."""

    architecture = "batch_topk"

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__(d_in, d_sae, k)
        self.register_buffer("threshold", torch.zeros(d_sae, dtype=torch.float32))

    def rule(self, share: Share) -> "BatchTopKRule":
        return BatchTopKRule(share.num_all_rows, self.k, share.group)

    @torch.no_grad()
    def after_step_(self, rule: Rule | None) -> None:
        """Move the threshold towards the smallest value that the step kept, if it kept any."""
        if isinstance(rule, BatchTopKRule) and rule.threshold is not None:
            self.threshold.lerp_(torch.full_like(self.threshold, rule.threshold), 1 - _EMA)

    def absorb_shift_(self, rows_ND: Tensor, latent: int) -> None:
        """As of every SAE, and thresholds anew: following a hundredth of the way each step, they would spend a short phase on getting there."""
        super().absorb_shift_(rows_ND, latent)
        self.calibrate_(rows_ND)


class MatryoshkaSae(BatchTopKSae):
    """BatchTopK whose first latents are dictionaries of their own, of sizes `prefixes`.

    Training averages the reconstruction losses of all nested dictionaries, so that general features come first.
    """

    architecture = "matryoshka"
    options = ("prefixes",)

    def __init__(self, d_in: int, d_sae: int, k: int, prefixes: Sequence[int] = ()):
        super().__init__(d_in, d_sae, k)
        # Each half of the next, as long as it can hold the active latents of a row.
        self.prefixes = tuple(prefixes) or tuple(d_sae >> n for n in (4, 3, 2, 1) if d_sae >> n >= max(1, k))
        if list(self.prefixes) != sorted(set(self.prefixes)) or any(not 0 < p < d_sae for p in self.prefixes):
            raise ValueError(
                f"prefixes must rise and lie between 1 and d_sae - 1, got {self.prefixes}. Pass --sae.prefixes."
            )


class BatchTopKRule(LargestRule):
    """The K * B largest positive of the whole batch (BatchTopK, Bussmann et al. 2024, section 3), exactly.

    `group` is the workers over which the batch's rows or the dictionary's latents are dealt; `num_rows` is the whole batch's.
    After `entries`, `threshold` is the smallest value that was kept, or None if no latent is positive.
    """

    def __init__(self, num_rows: int, k: int, group: dist.ProcessGroup | None = None):
        # Few rows have more than four times the average; those are looked at again.
        super().__init__(4 * k)
        self._total, self._group = num_rows * k, group
        self.threshold: float | None = None

    def entries(self, pre_acts: PreActs) -> Entries:
        values_BW, latents_BW = (torch.cat(part) for part in zip(*self._seen, strict=True))
        rows_BW = torch.arange(len(values_BW), device=values_BW.device)[:, None].expand_as(values_BW)
        lowest = self._lowest_kept(values_BW.flatten())
        cut_off = (values_BW[:, -1] > lowest) & (values_BW.shape[1] < self._num_latents)
        rows = cut_off.nonzero().flatten()
        keep_BW = (values_BW >= lowest) & (values_BW > 0) & ~cut_off[:, None]
        parts = [(values_BW[keep_BW], latents_BW[keep_BW], rows_BW[keep_BW])]
        for some in rows.split(64):
            pre_RS = pre_acts(some)
            row, latent = ((pre_RS >= lowest) & (pre_RS > 0)).nonzero(as_tuple=True)
            parts.append((pre_RS[row, latent], latent, some[row]))
        values, latents, owners = (torch.cat(part) for part in zip(*parts, strict=True))
        lowest = self._lowest_kept(values)
        order = torch.argsort(owners, stable=True)
        order = order[values[order] >= lowest]
        self.threshold = float(lowest) if lowest > 0 else None
        values = values[order]
        return Entries(values, latents[order], owners[order], torch.ones_like(values, dtype=torch.bool))

    def _lowest_kept(self, values_N: Tensor) -> Tensor:
        """The value of rank `total` among all workers' positive values; the smallest of them if there are fewer."""
        positive = values_N[values_N > 0]
        if self._group is not None:
            positive = all_gather_uneven(positive, self._group)
        if len(positive) == 0:
            return values_N.new_zeros(())
        return positive.kthvalue(max(1, len(positive) - self._total + 1)).values
