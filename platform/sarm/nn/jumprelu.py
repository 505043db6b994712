"""JumpReLU (Rajamanoharan et al. 2024). C rows of a chunk, S d_sae, K active latents a row on average."""

import torch
from torch import Tensor, nn

from .selection import Entries, PreActs, Rule, Share
from .thresholds import ThresholdSae


class JumpReluSae(ThresholdSae):
    """Every latent learns its own threshold by straight-through gradients of width `bandwidth`.

    Thresholds start where K latents a row are active; `l0_penalty` times (l0 / K - 1)^2 is added to the loss to keep it so.
    """

    architecture = "jumprelu"
    options = ("bandwidth", "l0_penalty")

    def __init__(self, d_in: int, d_sae: int, k: int, bandwidth: float = 0.1, l0_penalty: float = 1.0):
        super().__init__(d_in, d_sae, k)
        self.bandwidth, self.l0_penalty = bandwidth, l0_penalty
        self.threshold = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))

    def rule(self, share: Share) -> "JumpRule":
        return JumpRule(self.threshold.detach(), self.bandwidth)

    def penalty(self, l0_B: Tensor, share: Share) -> Tensor:
        """l0_penalty * (mean L0 / k - 1)^2, whose gradient needs the mean over all workers' rows."""
        excess = share.over_rows(l0_B.detach().sum()) / share.num_all_rows / self.k - 1
        slope = 2 * self.l0_penalty * excess / (share.num_all_rows * self.k)
        moving = slope * l0_B.sum()
        return moving + (self.l0_penalty * excess.square() / share.num_row_workers - moving).detach()

    @torch.no_grad()
    def after_step_(self, rule: Rule | None) -> None:
        """No threshold below 0."""
        self.threshold.clamp_min_(0.0)


class JumpRule:
    """Latents above their own threshold, and those within half a `bandwidth` of it, which move the threshold.

    JumpReLU (Rajamanoharan et al. 2024, section 3): z = pre * H(pre - threshold), with straight-through gradients to thresholds.
    """

    def __init__(self, threshold_S: Tensor, bandwidth: float):
        self._threshold, self.bandwidth, self._half = threshold_S, bandwidth, bandwidth / 2
        self._seen: list[Entries] = []
        self._num_rows = 0

    def see(self, pre_CS: Tensor) -> None:
        row, latent = (pre_CS > self._threshold - self._half).nonzero(as_tuple=True)
        pre, threshold = pre_CS[row, latent], self._threshold[latent]
        is_on = pre > threshold
        is_edge = (pre - threshold).abs() < self._half
        self._seen.append(
            Entries(values=pre * is_on, latents=latent, rows=row + self._num_rows, is_on=is_on, is_edge=is_edge)
        )
        self._num_rows += len(pre_CS)

    def entries(self, pre_acts: PreActs) -> Entries:
        return Entries(*(torch.cat(part) for part in zip(*self._seen, strict=True)))
