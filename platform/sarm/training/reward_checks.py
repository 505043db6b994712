"""What is counted, watched and measured while a reward model trains; the same on all ranks."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sarm.settings.checks import UserError

_RECENT_STEPS = 32
_NAMED_PAIRS = 8
# The loss of a pair whose rewards are equal.
_CHANCE = math.log(2)


class Outcome(NamedTuple):
    """What one micro-batch gave: its pairs with their losses and rewards, and what it cost. No gradient flows from here."""

    pair_ids: list[str]
    losses: Float[Tensor, " pairs"]
    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    num_tokens: int
    num_places: int
    """Tokens and padding."""
    data_seconds: float


class Sums(NamedTuple):
    """Sums over pairs, in float64, and over tokens; means come last, so that every pair weighs the same."""

    pairs: float
    loss: float
    correct: float
    margin: float
    reward: float
    reward_square: float
    tokens: float
    places: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Sums":
        """The sums over micro-batches of this rank."""
        if not outcomes:
            return cls(*[0.0] * len(cls._fields))
        losses, chosen, rejected = (
            torch.cat([getattr(outcome, name) for outcome in outcomes]) for name in ("losses", "chosen", "rejected")
        )
        rewards = torch.cat([chosen, rejected])
        return cls(
            float(len(losses)),
            float(losses.sum()),
            float((chosen > rejected).sum()),
            float((chosen - rejected).sum()),
            float(rewards.sum()),
            float(rewards.square().sum()),
            float(sum(outcome.num_tokens for outcome in outcomes)),
            float(sum(outcome.num_places for outcome in outcomes)),
        )

    def over_ranks(self, device: torch.device) -> "Sums":
        """The sums of all ranks, which all call it."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self
        values = torch.tensor(self, dtype=torch.float64, device=device)
        dist.all_reduce(values)
        return Sums(*values.tolist())

    def metrics(self) -> dict[str, float]:
        """Means under the names that MLflow shows."""
        pairs, mean = max(1.0, self.pairs), self.reward / max(1.0, 2 * self.pairs)
        return {
            "loss": self.loss / pairs,
            "accuracy": self.correct / pairs,
            "margin": self.margin / pairs,
            "reward_mean": mean,
            "reward_std": math.sqrt(max(0.0, self.reward_square / (2 * pairs) - mean**2)),
            "padding_share": 1 - self.tokens / max(1.0, self.places),
        }


class LossGuard:
    """Stops a training before it takes a step with a loss or a gradient that would ruin it, naming the pairs."""

    def __init__(self, max_rise: float):
        self._max_rise = max_rise
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)

    def check_loss(self, step: int, loss: float, losses: list[tuple[str, float]]) -> None:
        """Raise UserError if the mean loss of a step is not finite, or a spike; `losses` are those of this rank's pairs."""
        usual = max(_CHANCE, sum(self._recent) / max(1, len(self._recent)))
        if not math.isfinite(loss):
            self._stop(f"the loss of step {step} is {loss}", losses)
        if loss > self._max_rise * usual:
            self._stop(
                f"the loss of step {step} is {loss:.4g}, more than --reward.max-loss-rise {self._max_rise:g} times the usual {usual:.4g}",
                losses,
            )
        self._recent.append(loss)

    def check_gradient(self, step: int, norm: float, losses: list[tuple[str, float]]) -> None:
        """Raise UserError if the gradient's norm is not finite; the engine has taken no step with it."""
        if not math.isfinite(norm):
            self._stop(f"the gradient's norm at step {step} is {norm}", losses)

    def state(self) -> list[float]:
        """The losses that the next one is compared with."""
        return list(self._recent)

    def load(self, state: list[float]) -> None:
        """Go on after these losses."""
        self._recent.extend(state)

    def _stop(self, what: str, losses: list[tuple[str, float]]) -> None:
        parts: list[Any] = [losses]
        if dist.is_initialized() and dist.get_world_size() > 1:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, losses)
        everyones = [entry for part in parts for entry in part]
        worst = [pair for pair, loss in everyones if not math.isfinite(loss)] or [
            pair for pair, _ in sorted(everyones, key=lambda entry: -entry[1])
        ]
        named = ", ".join(worst[:_NAMED_PAIRS]) + (
            f" and {len(worst) - _NAMED_PAIRS} more" * (len(worst) > _NAMED_PAIRS)
        )
        raise UserError(
            f"{what}, so training stopped before that step. Its pairs, worst first: {named}. Look at them, or lower --reward.lr and --reward.head-lr."
        )


class Validation:
    """Which measurement was the best so far, and whether to stop."""

    def __init__(self, patience: int):
        self._patience = patience
        self.best_step, self.best_loss, self.num_worse = -1, math.inf, 0

    def add(self, step: int, loss: float) -> bool:
        """Count a measurement; returns whether it is the best so far."""
        is_best = loss < self.best_loss
        if is_best:
            self.best_step, self.best_loss, self.num_worse = step, loss, 0
        else:
            self.num_worse += 1
        return is_best

    @property
    def is_over(self) -> bool:
        """Whether the patience has run out."""
        return 0 < self._patience <= self.num_worse

    def state(self) -> list[float]:
        """What the next measurement is compared with."""
        return [self.best_step, self.best_loss, self.num_worse]

    def load(self, state: list[float]) -> None:
        """Go on after what `state` returned."""
        self.best_step, self.best_loss, self.num_worse = int(state[0]), state[1], int(state[2])
