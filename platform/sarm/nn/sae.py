"""TopK sparse autoencoder on standardised activations.

B batch, D d_in, S d_sae, K active latents.
x = (h - mean h) / (std h + 1e-6) per token;  pre = (x - b_dec) W_enc + b_enc;  z = relu(TopK(pre));  x_hat = z W_dec + b_dec.
The K active latents of a row are kept as `Codes`, never as a B x S tensor, so the backward pass costs 4K/S of a dense one.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

STANDARDISE_EPS = 1e-6


class Codes(NamedTuple):
    """The active latents of each row, by descending value; a latent of value 0 is inactive."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


def standardise(h: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
    """Each row minus its mean, over its unbiased standard deviation plus 1e-6, in float32 or wider (SARM section 3; SAFER)."""
    h = h if h.dtype == torch.float64 else h.float()
    std, mean = torch.std_mean(h, dim=-1, keepdim=True)
    return (h - mean) / (std + STANDARDISE_EPS)


class _TopKEncode(torch.autograd.Function):
    """relu(TopK(x_BD W_SD^T + b_S)) whose backward touches only the K active rows of W_SD.

    The gradient of W_SD is that of an embedding bag with rows x and weights dL/dz, one threaded call without a B x K x D tensor.
    """

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, W_SD: Tensor, b_S: Tensor, k: int) -> tuple[Tensor, Tensor]:
        pre_BS = torch.addmm(b_S, x_BD, W_SD.T)
        top_BK, indices_BK = torch.topk(pre_BS, k, dim=-1)
        values_BK = top_BK.relu()
        ctx.save_for_backward(x_BD, W_SD, values_BK, indices_BK)
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_SD, values_BK, indices_BK = ctx.saved_tensors
        # Latents of value 0 are off: relu's gradient is 0 there, also when fewer than K pre-activations are positive.
        grad_BK = grads[0] * (values_BK > 0)
        need_x, need_W, need_b, _ = ctx.needs_input_grad
        # Only a reward model asks for it, with one row a response: gathering B x K x D is cheaper than copying a strided W.
        grad_x = torch.bmm(grad_BK[:, None], W_SD[indices_BK])[:, 0] if need_x else None
        grad_W = _bag_weight_gradient(x_BD, indices_BK, grad_BK, W_SD.shape[0]) if need_W else None
        grad_b = None
        if need_b:
            grad_b = torch.zeros(W_SD.shape[0], dtype=grad_BK.dtype, device=grad_BK.device)
            grad_b.index_add_(0, indices_BK.flatten(), grad_BK.flatten())
        return grad_x, grad_W, grad_b, None


def _bag_weight_gradient(rows_BD: Tensor, indices_BK: Tensor, weights_BK: Tensor, num_rows: int) -> Tensor:
    """sum over (b, k) of weights[b, k] * rows[b] into row indices[b, k]: the weight gradient of `embedding_bag`."""
    with torch.enable_grad():
        table = (
            torch.zeros(1, device=rows_BD.device, dtype=rows_BD.dtype)
            .expand(num_rows, rows_BD.shape[1])
            .requires_grad_()
        )
        bags = F.embedding_bag(indices_BK, table, per_sample_weights=weights_BK.detach(), mode="sum")
    (gradient,) = torch.autograd.grad(bags, table, rows_BD)
    return gradient


class TopKSae(nn.Module):
    """Parameters as SAELens names and shapes them: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec; always float32.

    Calling it encodes: standardised rows in, `Codes` out.
    """

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__()
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must be between 1 and d_sae={d_sae}, got k={k}. Pass --sae.k.")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        # Stored latent by latent: a step reads and writes whole rows of the few active latents.
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, dtype=torch.float32).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in, dtype=torch.float32))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=torch.float32))

    @torch.no_grad()
    def initialise_(self, sample_ND: Float[Tensor, "rows d_in"], generator: torch.Generator) -> None:
        """Random unit decoder rows, encoder its transpose, b_dec the mean of a sample, so training starts mean-centred.

        The encoder is scaled so that the first reconstructions fit their inputs best in the sense of least squares.
        """
        self.b_dec.copy_(sample_ND.float().mean(0))
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.normalise_decoder_()
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        x_ND = sample_ND[:1024].float()
        centred, reconstructed = x_ND - self.b_dec, self.decode(self(x_ND)) - self.b_dec
        self.W_enc.mul_((centred * reconstructed).sum() / reconstructed.square().sum().clamp_min(1e-12))

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """Encode standardised rows."""
        # Autocast and 16-bit weights would leave latents tied at the k-th value (SARM, implementation notes).
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W_enc.dtype)
            values, indices = _TopKEncode.apply(x - self.b_dec, self.W_enc.T, self.b_enc, self.k)
        return Codes(values, indices)

    def decode(self, codes: Codes) -> Float[Tensor, "batch d_in"]:
        """x_hat of the codes."""
        return F.embedding_bag(codes.indices, self.W_dec, per_sample_weights=codes.values, mode="sum") + self.b_dec

    @torch.no_grad()
    def absorb_shift_(self, rows_ND: Float[Tensor, "rows d_in"], latent: int) -> None:
        """Make the dictionary blind to how far these rows' mean lies from b_dec, and let one (unused) latent carry that shift.

        Chat ends lie far from sentence ends. Unless that common shift is taken out, it alone decides which latents win TopK, the
        same few at every chat end: under 1 % of the dictionary is then alive at the rewarded token, as in the published SAE.
        Earlier rows lose one direction of d_in, which the latent gives back.
        """
        shift_D = rows_ND.to(self.b_dec.dtype).mean(0) - self.b_dec
        unit_D = shift_D / shift_D.norm().clamp_min(1e-12)
        self.W_enc.sub_(torch.outer(unit_D, unit_D @ self.W_enc))
        self.W_enc[:, latent] = unit_D
        self.W_dec[latent] = unit_D
        self.b_enc[latent] = 0.0

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Give every decoder row unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take out of the decoder's gradient what would only change row norms, since normalising undoes it but Adam's moments keep it."""
        if self.W_dec.grad is not None:
            along_S1 = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad.addcmul_(along_S1, self.W_dec, value=-1.0)


def dense(codes: Codes, d_sae: int) -> Float[Tensor, "batch d_sae"]:
    """The codes as a B x S tensor, for small batches and tests."""
    full = torch.zeros(codes.values.shape[0], d_sae, dtype=codes.values.dtype, device=codes.values.device)
    return full.scatter_(1, codes.indices, codes.values)
