"""Triton kernels of the sparse step, for CUDA; sums in a fixed order, so a step can be repeated bit for bit (no atomics).

N entries, D d_in, S d_sae. Each program owns one bag or one latent and walks its entries, whose rows it streams.
Only imported where CUDA is used (`backends.backend_for`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bags import Bags

_MAX_BLOCK = 1024


@triton.jit
def _decode_kernel(out, weights, values, latents, offsets, num_bags, num_entries, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start = tl.load(offsets + bag)
    stop = tl.load(offsets + bag + 1, mask=bag + 1 < num_bags, other=num_entries)
    total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    for n in range(start, stop):
        latent = tl.load(latents + n)
        total += tl.load(values + n) * tl.load(weights + latent * d + columns, mask=inside, other=0.0)
    tl.store(out + bag * d + columns, total, mask=inside)


@triton.jit
def _value_gradients_kernel(out, grad, weights, latents, bags, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0).to(tl.int64)
    latent = tl.load(latents + n)
    bag = tl.load(bags + n)
    total = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
    for first in range(0, d, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < d
        row = tl.load(grad + bag * d + columns, mask=inside, other=0.0)
        total += row * tl.load(weights + latent * d + columns, mask=inside, other=0.0)
    tl.store(out + n, tl.sum(total, axis=0))


@triton.jit
def _weight_gradients_kernel(  # type: ignore[no-untyped-def]
    grad_enc, grad_bias, grad_dec, x, grad, pre_grads, values, rows, bags, order, starts, d, BLOCK: tl.constexpr
):
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start = tl.load(starts + latent)
    stop = tl.load(starts + latent + 1)
    enc = tl.zeros((BLOCK,), dtype=grad_enc.dtype.element_ty)
    dec = tl.zeros((BLOCK,), dtype=grad_enc.dtype.element_ty)
    # A block, not a scalar: what a loop carries must keep its type, whatever the weights' is.
    bias = tl.zeros((1,), dtype=grad_enc.dtype.element_ty)
    for place in range(start, stop):
        n = tl.load(order + place)
        pre_grad = tl.load(pre_grads + n)
        enc += pre_grad * tl.load(x + tl.load(rows + n) * d + columns, mask=inside, other=0.0)
        dec += tl.load(values + n) * tl.load(grad + tl.load(bags + n) * d + columns, mask=inside, other=0.0)
        bias += pre_grad
    tl.store(grad_enc + latent * d + columns, enc, mask=inside)
    tl.store(grad_dec + latent * d + columns, dec, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(grad_bias + latent, tl.sum(bias, axis=0))


class TritonBackend:
    """The sparse products as Triton kernels."""

    def decode(self, W_SD: Tensor, values_N: Tensor, bags: Bags) -> Tensor:
        W_SD, d = W_SD.contiguous(), W_SD.shape[1]
        num_bags = len(bags.offsets)
        out = W_SD.new_empty(num_bags, d)
        block = _block(d)
        _decode_kernel[(num_bags, triton.cdiv(d, block))](
            out, W_SD, values_N.contiguous(), bags.latents, bags.offsets, num_bags, len(values_N), d, BLOCK=block
        )
        return out

    def value_gradients(self, grad_GD: Tensor, W_SD: Tensor, bags: Bags) -> Tensor:
        W_SD, d = W_SD.contiguous(), W_SD.shape[1]
        out = W_SD.new_empty(len(bags.latents))
        if len(out):
            _value_gradients_kernel[(len(out),)](
                out, grad_GD.contiguous(), W_SD, bags.latents, bags.bags, d, BLOCK=_block(d)
            )
        return out

    def weight_gradients(
        self, x_BD: Tensor, grad_GD: Tensor, pre_grads_N: Tensor, values_N: Tensor, bags: Bags, num_latents: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        d = x_BD.shape[1]
        # A stable sort: the entries of a latent are added in the order of their rows.
        latents, order = torch.sort(bags.latents, stable=True)
        starts = torch.searchsorted(latents, torch.arange(num_latents + 1, device=latents.device))
        enc, dec = x_BD.new_empty(num_latents, d), x_BD.new_empty(num_latents, d)
        bias = x_BD.new_empty(num_latents)
        block = _block(d)
        _weight_gradients_kernel[(num_latents, triton.cdiv(d, block))](
            enc, bias, dec, x_BD.contiguous(), grad_GD.contiguous(), pre_grads_N.contiguous(), values_N.contiguous(),
            bags.rows, bags.bags, order, starts, d, BLOCK=block,
        )  # fmt: skip
        return enc, bias, dec


def _block(d: int) -> int:
    power: int = triton.next_power_of_2(d)
    return min(_MAX_BLOCK, power)
