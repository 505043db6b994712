"""Triton kernels of the sparse step, for CUDA; sums in a fixed order, so a step can be repeated bit for bit (no atomics).

N entries, D d_in, S d_sae. Each program owns one bag or one latent and walks its entries, whose rows it streams.
Only imported where CUDA is used (`backends.backend_for`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bags import Bags, pieces_of

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
    grad_enc, grad_bias, grad_dec, x, grad, pre_grads, values, rows, bags, order, starts, stops, targets, d,
    BLOCK: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start = tl.load(starts + piece)
    stop = tl.load(stops + piece)
    target = tl.load(targets + piece)
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
    tl.store(grad_enc + target * d + columns, enc, mask=inside)
    tl.store(grad_dec + target * d + columns, dec, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(grad_bias + target, tl.sum(bias, axis=0))


@triton.jit
def _add_pieces_kernel(grad_enc, grad_bias, grad_dec, more, d, num_latents, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    latent = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start = tl.load(more + latent)
    stop = tl.load(more + latent + 1)
    if start < stop:
        enc = tl.load(grad_enc + latent * d + columns, mask=inside, other=0.0)
        dec = tl.load(grad_dec + latent * d + columns, mask=inside, other=0.0)
        bias = tl.zeros((1,), dtype=grad_enc.dtype.element_ty) + tl.load(grad_bias + latent)
        for place in range(start, stop):
            enc += tl.load(grad_enc + (num_latents + place) * d + columns, mask=inside, other=0.0)
            dec += tl.load(grad_dec + (num_latents + place) * d + columns, mask=inside, other=0.0)
            bias += tl.load(grad_bias + num_latents + place)
        tl.store(grad_enc + latent * d + columns, enc, mask=inside)
        tl.store(grad_dec + latent * d + columns, dec, mask=inside)
        if tl.program_id(1) == 0:
            tl.store(grad_bias + latent, tl.sum(bias, axis=0))


class TritonBackend:
    """The sparse products as Triton kernels.

    One program adds up at most `piece_entries` entries of a latent: one that fires on every row would keep the card waiting for it alone.
    """

    def __init__(self, piece_entries: int = 512):
        self.piece_entries = piece_entries

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
        pieces = pieces_of(latents, num_latents, self.piece_entries)
        enc, dec = x_BD.new_empty(pieces.num_targets, d), x_BD.new_empty(pieces.num_targets, d)
        bias = x_BD.new_empty(pieces.num_targets)
        block = _block(d)
        blocks = triton.cdiv(d, block)
        _weight_gradients_kernel[(len(pieces.targets), blocks)](
            enc, bias, dec, x_BD.contiguous(), grad_GD.contiguous(), pre_grads_N.contiguous(), values_N.contiguous(),
            bags.rows, bags.bags, order, pieces.starts, pieces.stops, pieces.targets, d, BLOCK=block,
        )  # fmt: skip
        if pieces.num_targets > num_latents + 1:
            _add_pieces_kernel[(num_latents, blocks)](enc, bias, dec, pieces.more, d, num_latents, BLOCK=block)
        return enc[:num_latents], bias[:num_latents], dec[:num_latents]


def _block(d: int) -> int:
    power: int = triton.next_power_of_2(d)
    return min(_MAX_BLOCK, power)
