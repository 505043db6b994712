"""The k largest pre-activations of each row, exactly, at the cost of a 16-bit matrix product.

B rows, C rows of a chunk, D d_in, S latents, M candidates a row. A product of bfloat16 copies says which latents cannot be among
a row's k largest, because its error has a bound; only the candidates that remain are computed in float32. A row whose
candidates are not proved to hold its k largest is computed whole. No published trainer does this; the bound is the
Cauchy-Schwarz inequality on what rounding took away.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .precision import deciding
from .selection import BLOCK, largest, largest_by_blocks

# Rows at once: their 16-bit pre-activations stay near the cores. On a GPU, enough to fill it: each chunk waits for one look at what was proved.
_ROWS = {"cpu": 512, "cuda": 4096}
# NVIDIA's cards multiply bfloat16 since this compute capability.
_LEAST_CAPABILITY = (8, 0)
# Candidates for each wanted latent: at 9,216 latents, 27 of them wanted, 1.5 leave a quarter of the rows unproved, 2 under a hundredth.
_CANDIDATES = 2
# Below, the smaller product is not worth the second look.
_LEAST_WIDTH, _LEAST_D_IN = 64, 128
# A batch whose first rows are proved more rarely than this is not screened further.
_LEAST_PROVED = 0.75
# Spacing of bfloat16 and float32 numbers, relative to their size.
_EPS_16, _EPS_32 = 2.0**-8, 2.0**-23
# 16-bit products flush what is smaller than any float32 of full precision.
_UNDERFLOW = 1e-30


class Screen:
    """The 16-bit copy of an encoder, refreshed once a step: 2 bytes a weight."""

    def __init__(self) -> None:
        self._W16_SD = self._pre16_CS = torch.empty(0, 0, dtype=torch.bfloat16)

    def largest(
        self, rows_BD: Float[Tensor, "rows d_in"], W_SD: Float[Tensor, "latents d_in"], b_S: Float[Tensor, " latents"], k: int
    ) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]] | None:  # fmt: skip
        """Values (float32 dot products) and latents of the k largest of each row, by descending value.

        None if the rows are such that the screen proves too little; call it only where `is_worth_it`. The bound holds for 16-bit products that
        are summed in float32 and candidates that are computed in it, which GPUs have to be told (`deciding`).
        """
        with deciding():
            return self._largest(rows_BD, W_SD, b_S, k)

    def _largest(self, rows_BD: Tensor, W_SD: Tensor, b_S: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
        num_latents, d_in = W_SD.shape
        if self._W16_SD.shape != W_SD.shape:
            self._W16_SD = W_SD.new_empty(W_SD.shape, dtype=torch.bfloat16)
            self._pre16_CS = W_SD.new_empty((_ROWS[W_SD.device.type], num_latents), dtype=torch.bfloat16)
        self._W16_SD.copy_(W_SD)
        b16_S = b_S.bfloat16()
        largest_norm, largest_loss = _norms(W_SD, self._W16_SD)
        # What adding the bias may round away, and what summing d_in products in float32 may, here and in the candidates.
        bias_error = _EPS_16 * b_S.abs().max()
        found = []
        for number, rows in enumerate(rows_BD.split(len(self._pre16_CS))):
            rows16 = rows.bfloat16()
            pre16 = torch.addmm(b16_S, rows16, self._W16_SD.T, out=self._pre16_CS[: len(rows)])
            values, latents = largest_by_blocks(pre16, _CANDIDATES * k)
            lost, norm = (rows - rows16.float()).norm(dim=1), rows.norm(dim=1)
            error = (
                1.01 * (lost * largest_norm + norm * largest_loss)
                + 2 * d_in * _EPS_32 * norm * largest_norm
                + bias_error
                + _UNDERFLOW
            )
            passed_over = values[:, -1]
            bound = passed_over + _EPS_16 * passed_over.abs() + error
            exact = _dots(rows, W_SD, b_S, latents)
            top = torch.topk(exact, k, dim=1)
            top_values, top_latents = top.values, latents.gather(1, top.indices)
            is_proved = bound < top_values[:, -1]
            unproved = (~is_proved).nonzero().flatten()
            if number == 0 and len(unproved) > (1 - _LEAST_PROVED) * len(rows):
                return None
            if len(unproved):
                again = largest(torch.addmm(b_S, rows[unproved], W_SD.T), k)
                top_values[unproved], top_latents[unproved] = again
            found.append((top_values, top_latents))
        all_values, all_latents = (torch.cat(part) for part in zip(*found, strict=True))
        return all_values, all_latents


def is_worth_it(W_SD: Tensor, k: int) -> bool:
    """Whether this machine multiplies bfloat16 faster than float32 and the k largest are few among the latents."""
    num_latents, d_in = W_SD.shape
    return (
        W_SD.dtype == torch.float32
        and _multiplies_bfloat16(W_SD.device)
        and num_latents % BLOCK == 0
        and num_latents >= _LEAST_WIDTH * k
        and d_in >= _LEAST_D_IN
    )


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Natively: where it is emulated, the smaller product is the slower."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _norms(W_SD: Tensor, W16_SD: Tensor) -> tuple[Tensor, Tensor]:
    """The largest norm of a latent's encoder row and of what its 16-bit copy lost."""
    norms, losses = [], []
    for exact, rounded in zip(W_SD.split(1024), W16_SD.split(1024), strict=True):
        norms.append(exact.norm(dim=1).max())
        losses.append((exact - rounded).norm(dim=1).max())
    return torch.stack(norms).max(), torch.stack(losses).max()


def _dots(rows_CD: Tensor, W_SD: Tensor, b_S: Tensor, latents_CM: Tensor) -> Tensor:
    """b[s] + <row, W[s]> of each row's candidates, without a C x M x D tensor."""
    num_rows, num_each = latents_CM.shape
    bags = torch.arange(num_rows, device=rows_CD.device).repeat_interleave(num_each)
    offsets = torch.arange(0, num_rows * num_each, num_each, device=rows_CD.device)
    dots_N: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_CD.contiguous(), W_SD, latents_CM.flatten(), offsets, bags, 0, -1
    )
    return dots_N.view(num_rows, num_each) + b_S[latents_CM]
