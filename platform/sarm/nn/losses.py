"""Losses and their running sums. B batch, D d_in, P pairs. FVU = sum|x - x_hat|^2 / sum|x - mean x|^2."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def reconstruction_loss(x_hat: Float[Tensor, "batch d_in"], x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " batch"]:
    """|x_hat - x|^2 / |x|^2 of each row (SARM equation 3; SAFER's normalised MSE)."""
    return (x_hat - x).square().sum(-1) / x.square().sum(-1).clamp_min(1e-12)


def bradley_terry(margins: Float[Tensor, " pairs"], label_smoothing: float = 0.0) -> Float[Tensor, " pairs"]:
    """-(1 - s) log sigmoid(m) - s log sigmoid(-m) of each pair's margin m = chosen - rejected, in float32 or wider.

    SARM equation 5 at s = 0; s is the share of pairs taken to be labelled the wrong way round (conservative DPO, Mitchell 2023). Where
    annotators said by how much the chosen one is better, the caller takes that off m first (Llama 2, section 3.2.2).
    """
    margins = margins if margins.dtype == torch.float64 else margins.float()
    # -log sigmoid(-m) = m + -log sigmoid(m).
    return F.softplus(-margins) + label_smoothing * margins


def reward_centring(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """(chosen + rejected)^2 of each pair, which pins the rewards' arbitrary constant (Eisenstein et al. 2023, section 3)."""
    return (chosen + rejected).square()


def cosine(x_hat: Float[Tensor, "batch d_in"], x: Float[Tensor, "batch d_in"]) -> Float[Tensor, " batch"]:
    """Cosine of the angle between each row and its reconstruction; 0 where one of them is zero."""
    return F.cosine_similarity(x_hat, x, dim=-1, eps=1e-12)


def reward_fidelity(
    x: Float[Tensor, "rows d_in"], x_hat: Float[Tensor, "rows d_in"], weight_D: Float[Tensor, " d_in"]
) -> float | None:
    """Share of the variance of a linear reward x . weight that is kept when x is replaced by x_hat.

    1 - sum((x_hat - x) . weight)^2 / sum(x . weight - mean)^2 in float64: 1 if no reward changes, below 0 if the change is larger
    than the rewards' spread; None without two different rewards.
    """
    weight_D = weight_D.double()
    reward_N = x.double() @ weight_D
    changed = ((x_hat - x).double() @ weight_D).square().sum()
    variance = (reward_N - reward_N.mean()).square().sum() if len(reward_N) else reward_N.new_zeros(())
    return float(1 - changed / variance) if variance > 1e-12 * reward_N.square().sum() else None


class VarianceUnexplained:
    """FVU over a data set as one ratio of sums in float64; a mean of batch ratios would depend on the batch size."""

    def __init__(self, d_in: int):
        self._rows = 0
        self._error = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)
        self._sum = torch.zeros(d_in, dtype=torch.float64)

    def add(self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> None:
        """Count a batch."""
        x, x_hat = x.detach().double().cpu(), x_hat.detach().double().cpu()
        self._rows += x.shape[0]
        self._error += (x - x_hat).square().sum()
        self._squares += x.square().sum()
        self._sum += x.sum(0)

    def value(self) -> float | None:
        """FVU of what was added; None without at least two different rows."""
        if self._rows == 0:
            return None
        variance = self._squares - self._sum.square().sum() / self._rows
        # Equal rows leave a rounding error instead of 0.
        return float(self._error / variance) if variance > 1e-12 * self._squares else None
