"""What runs a reward model's passes and takes its steps: one interface for DeepSpeed's ZeRO and for one process without it."""

import math
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sarm.training.sparse_adamw import adamw


@runtime_checkable
class Engine(Protocol):
    """A model with its optimizer: `sarm.engine.deepspeed.zero.ZeroEngine`, or `LocalEngine` in one process without DeepSpeed.

    `step` clips at `norm_factor` times the settings' norm and returns the norm before; it takes no step if that is not finite.
    """

    device: torch.device

    def __call__(self, **inputs: Any) -> Any: ...
    def train(self, mode: bool) -> None: ...
    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None: ...
    def step(self, rate_factor: float, norm_factor: float = 1.0) -> float: ...


class LocalEngine:
    """AdamW in one process: the reference that sharded engines are compared with."""

    def __init__(self, model: torch.nn.Module, parameter_groups: list[dict[str, Any]], max_grad_norm: float):
        self.model, self.device = model, next(model.parameters()).device
        self._optimizer = adamw(parameter_groups)
        self._rates = [group["lr"] for group in parameter_groups]
        self._parameters = [p for group in parameter_groups for p in group["params"]]
        self._max_grad_norm = max_grad_norm

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def backward(self, loss: Float[Tensor, ""], *, last: bool) -> None:
        loss.backward()

    def step(self, rate_factor: float, norm_factor: float = 1.0) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm * norm_factor))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm
