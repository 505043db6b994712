"""`flex_attention` with block masks beside whole masks, forward and backward, with heads of several shapes."""

import pytest
import torch
import torch.nn.functional as F
from tests.gpu.cards import ON_CORES
from torch import Tensor
from transformers.integrations.flex_attention import flex_attention_forward

from sarm.nn.attention import block_mask, keep_every_kernel_
from sarm.nn.segments import visible

pytestmark = pytest.mark.gpu
# Query heads, key heads, width of a head.
HEADS = {"equal": (4, 4, 64), "grouped": (32, 8, 128), "no power of two": (9, 3, 64), "wide": (8, 4, 256), "narrow": (4, 2, 16)}  # fmt: skip
SHAPES = [(1, 700), (3, 257), (5, 90)]


def segments_of(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Positions and segments of a prompt, two answers to it and padding in every row, each row at other places."""
    positions, segments = torch.zeros(2, rows, length, dtype=torch.long)
    for row in range(rows):
        prompt, first = length // 4 + row, length // 2 + row
        last = length - 3 * row
        segments[row, prompt:first], segments[row, first:last], segments[row, last:] = 1, 2, -1
        positions[row, :first] = torch.arange(first)
        positions[row, first:last] = torch.arange(prompt, prompt + last - first)
    return positions, segments


def with_gradients(found: Tensor, inputs: list[Tensor], weights: Tensor, is_token: Tensor) -> list[Tensor]:
    """The output and the gradients of its weighted sum, over tokens that are no padding. Cores have no backward pass of `flex_attention`."""
    found = found * is_token[:, None, :, None]
    gradients = [] if ON_CORES else torch.autograd.grad((found * weights.to(found)).sum(), inputs)
    return [found.detach().double(), *(gradient.double() for gradient in gradients)]


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_blocks_give_what_a_whole_mask_gives(
    heads: tuple[int, int, int], window: int | None, dtype: torch.dtype, card: torch.device
) -> None:
    num_heads, key_heads, width = heads
    keep_every_kernel_()
    generator = torch.Generator().manual_seed(0)
    for rows, length in SHAPES:
        positions, segments = (part.to(card) for part in segments_of(rows, length))
        seen = visible(positions, segments, window)[:, None]
        inputs = [
            torch.randn(rows, number, length, width, generator=generator).to(card, dtype)
            for number in (num_heads, key_heads, key_heads)
        ]
        weights = torch.randn(rows, num_heads, length, width, generator=generator).to(card)

        def plain(in_dtype: torch.dtype) -> list[Tensor]:
            own = [x.to(in_dtype).detach().requires_grad_() for x in inputs]  # noqa: B023
            q, (k, v) = own[0], (x.repeat_interleave(num_heads // key_heads, 1) for x in own[1:])
            return with_gradients(F.scaled_dot_product_attention(q, k, v, attn_mask=seen), own, weights, segments >= 0)  # noqa: B023

        own = [x.detach().requires_grad_(not ON_CORES) for x in inputs]
        with torch.compiler.set_stance("force_eager" if ON_CORES else "default"):
            q, k, v = own
            mask = block_mask(positions, segments, window)
            output, _ = flex_attention_forward(torch.nn.Identity(), q, k, v, mask, scaling=width**-0.5)
        found = with_gradients(output.transpose(1, 2), own, weights, segments >= 0)
        for ours, whole, exact in zip(found, plain(dtype), plain(torch.float64), strict=True):
            # No further from float64 than three times what the same dtype gives with a whole mask.
            assert (ours - exact).abs().max() <= 3 * (whole - exact).abs().max() + 1e-5
