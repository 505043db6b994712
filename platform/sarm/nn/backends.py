"""The sparse products of a training step, on PyTorch's own kernels or on Triton's.

N entries, D d_in, S d_sae, G bags.
"""

import warnings
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .bags import Bags
from .sae import bag_weight_gradient


@runtime_checkable
class Backend(Protocol):
    """The three sparse products of a step."""

    def decode(self, W_SD: Tensor, values_N: Tensor, bags: Bags) -> Tensor:
        """Every bag's sum of values[n] * W[latents[n]]."""

    def value_gradients(self, grad_GD: Tensor, W_SD: Tensor, bags: Bags) -> Tensor:
        """<grad[bags[n]], W[latents[n]]> of each entry."""

    def weight_gradients(
        self, x_BD: Tensor, grad_GD: Tensor, pre_grads_N: Tensor, values_N: Tensor, bags: Bags, num_latents: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of W_enc (as S x D), b_enc and W_dec."""


class TorchBackend:
    """ATen calls only, on any device; both weight gradients are those of an embedding bag."""

    def decode(self, W_SD: Tensor, values_N: Tensor, bags: Bags) -> Tensor:
        return F.embedding_bag(bags.latents, W_SD, bags.offsets, per_sample_weights=values_N, mode="sum")

    def value_gradients(self, grad_GD: Tensor, W_SD: Tensor, bags: Bags) -> Tensor:
        gradient_N: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_GD, W_SD, bags.latents, bags.offsets, bags.bags, 0, -1
        )
        return gradient_N

    def weight_gradients(
        self, x_BD: Tensor, grad_GD: Tensor, pre_grads_N: Tensor, values_N: Tensor, bags: Bags, num_latents: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            bag_weight_gradient(
                rows_GD=x_BD, latents_N=bags.latents, bags_N=bags.rows, weights_N=pre_grads_N, num_latents=num_latents
            ),
            pre_grads_N.new_zeros(num_latents).index_add_(0, bags.latents, pre_grads_N),
            bag_weight_gradient(
                rows_GD=grad_GD, latents_N=bags.latents, bags_N=bags.bags, weights_N=values_N, num_latents=num_latents
            ),
        )


def backend_for(device: torch.device) -> Backend:
    """Triton kernels on CUDA if a first launch works, else ATen; warns if that is several times as slow as it could be."""
    if device.type != "cuda":
        return TorchBackend()
    try:
        from .triton_backend import TritonBackend
    except ImportError as error:
        reason = str(error)
    else:
        kernels = TritonBackend()
        reason = why_not_launched(kernels, device)
        if not reason:
            return kernels
    warnings.warn(
        f"the SAE's sparse products run on PyTorch's own kernels, since Triton's do not run here: {reason} Triton needs a C compiler (gcc) and libc's headers.",
        stacklevel=2,
    )
    return TorchBackend()


def why_not_launched(backend: Backend, device: torch.device) -> str:
    """Why a first, tiny product fails, in one line; '' if it is right. What is compiled at its first launch may lack a compiler then."""
    try:
        order = torch.tensor([0, 1], device=device)
        bags = Bags(latents=order.flip(0), rows=order, bags=order, offsets=order)
        weights_SD = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
        found = backend.decode(weights_SD, torch.tensor([1.0, 2.0], device=device), bags)
        expected = torch.tensor([[3.0, 4.0], [2.0, 4.0]], device=device)
        return "" if torch.equal(found, expected) else "a first product came out wrong."
    except Exception as error:  # whatever a compiler or driver raises
        line = " ".join(str(error).split())[:300].rstrip(".")
        return f"{line or type(error).__name__}."
