"""How exact matrix products on GPUs are: TF32 where nothing but a number depends on them, whole float32 where they decide.

TF32 keeps 10 bits of a float32 number's 23: enough for a gradient, and not for which of two close latents is the larger.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deciding() -> Iterator[None]:
    """Inside, float32 products are not rounded to TF32, and sums of 16-bit products stay in float32: they decide which latents are active."""
    products = torch.backends.cuda.matmul
    before = products.allow_tf32, products.allow_bf16_reduced_precision_reduction
    products.allow_tf32 = products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        products.allow_tf32, products.allow_bf16_reduced_precision_reduction = before


def allow_tf32_() -> None:
    """Let float32 products of this process run as TF32 on GPUs, except for those that are `deciding`."""
    torch.backends.cuda.matmul.allow_tf32 = True
