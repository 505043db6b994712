"""Whether weights are numbers."""

from collections.abc import Iterable

import torch
from torch import Tensor


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Name of the first tensor with a value that is NaN or infinite, empty if there is none; reads each once and copies nothing."""
    for name, tensor in tensors:
        if tensor.numel() and not torch.stack(torch.aminmax(tensor.detach())).isfinite().all():
            return name
    return ""
