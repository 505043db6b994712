"""Whether weights are numbers."""

from collections.abc import Iterable

import torch
from torch import Tensor


def not_floats(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Name and type of the first tensor of whole numbers, empty if there is none: quantised weights, whose scales no reader here takes."""
    return next((f"{name} ({tensor.dtype})" for name, tensor in tensors if not tensor.is_floating_point()), "")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Name of the first tensor with a value that is NaN or infinite, empty if there is none; reads each once and copies nothing."""
    for name, tensor in tensors:
        if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
            return name
    return ""
