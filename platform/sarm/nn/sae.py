"""Sparse autoencoders on activations: what all architectures share.

B batch, D d_in, S d_sae, K active latents.
x = (h - mean h) / (std h + 1e-6) per token, or h itself (`Sae.standardises`);  pre = (x - b_dec) W_enc + b_enc;  z = the architecture's rule of pre;  x_hat = z W_dec + b_dec.
The K active latents of a row are kept as `Codes`, never as a B x S tensor, so the backward pass costs 4K/S of a dense one.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .precision import deciding
from .selection import Reconstruction, Rule, Share, TopKRule

STANDARDISE_EPS = 1e-6


class Codes(NamedTuple):
    """The active latents of each row, by descending absolute value; a latent of value 0 is inactive."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


def standardise(h: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
    """Each row minus its mean, over its unbiased standard deviation plus 1e-6, in float32 or wider (SARM section 3; SAFER)."""
    h = h if h.dtype == torch.float64 else h.float()
    std, mean = torch.std_mean(h, dim=-1, keepdim=True)
    return (h - mean) / (std + STANDARDISE_EPS)


# What an architecture makes of pre-activations: values, their latents, and where the gradient passes; all [batch, width].
Activation = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class _Encode(torch.autograd.Function):
    """activate(x_BD W_SD^T + b_S) whose backward touches only the active rows of W_SD."""

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, W_SD: Tensor, b_S: Tensor, activate: Activation) -> tuple[Tensor, Tensor]:
        with deciding():
            pre_BS = torch.addmm(b_S, x_BD, W_SD.T)
        values_BK, indices_BK, is_on_BK = activate(pre_BS)
        ctx.save_for_backward(x_BD, W_SD, indices_BK, is_on_BK)
        ctx.mark_non_differentiable(indices_BK)
        return values_BK, indices_BK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_SD, indices_BK, is_on_BK = ctx.saved_tensors
        grad_BK = grads[0] * is_on_BK
        need_x, need_W, need_b, _ = ctx.needs_input_grad
        # Only a reward model asks for it, with one row a response: gathering B x K x D is cheaper than copying a strided W.
        grad_x = torch.bmm(grad_BK[:, None], W_SD[indices_BK])[:, 0] if need_x else None
        latents_N, weights_N = indices_BK.flatten(), grad_BK.flatten()
        grad_W = None
        if need_W:
            bags_N = torch.arange(len(x_BD), device=x_BD.device).repeat_interleave(indices_BK.shape[1])
            grad_W = bag_weight_gradient(
                rows_GD=x_BD, latents_N=latents_N, bags_N=bags_N, weights_N=weights_N, num_latents=W_SD.shape[0]
            )
        grad_b = weights_N.new_zeros(W_SD.shape[0]).index_add_(0, latents_N, weights_N) if need_b else None
        return grad_x, grad_W, grad_b, None


def bag_weight_gradient(
    rows_GD: Float[Tensor, "bags d_in"],
    latents_N: Int[Tensor, " entries"],
    bags_N: Int[Tensor, " entries"],
    weights_N: Float[Tensor, " entries"],
    num_latents: int,
) -> Float[Tensor, "latents d_in"]:
    """Sum over entries n of weights[n] * rows[bags[n]] into row latents[n]: the weight gradient of an embedding bag.

    One threaded call without an entries x d_in tensor.
    """
    none = latents_N.new_empty(0)
    gradient_SD: Tensor = torch.ops.aten._embedding_bag_dense_backward(
        rows_GD.contiguous(), latents_N, bags_N, none, none, num_latents, False, 0, weights_N, -1
    )
    return gradient_SD


class Sae(nn.Module, ABC):
    """What all architectures share, and what each says of itself: a file of its own, and an entry in `architectures`.

    Codes: `activate`, or `encode` where codes are no function of one set of pre-activations. Training: `rule` (or `pursue`), `aux_rule`,
    `prefixes`, `penalty`, `after_step_`, `absorb_shift_`. Files: `options` and `exported_as`.

    Parameters as SAELens names and shapes them: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec; always float32.
    Calling it encodes rows (`rows_of` activations) into `Codes`, and decodes `Codes` into rows: where parameters are sharded, they are there
    during a call.
    """

    architecture: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters beside d_sae and k: arguments, attributes, settings, and fields of `cfg.json`."""
    exported_as: str
    """The rule by which a reader who knows nothing of training gets the codes; file formats list the rules they can hold."""
    is_tied: ClassVar[bool] = False
    """Whether the encoder is the decoder's transpose, and neither W_enc nor b_enc a parameter."""
    standardises: bool = True
    """Whether x is the standardised activation, as in every SAE that is trained here, or the activation itself, as in most published ones."""
    prefixes: tuple[int, ...] = ()
    """Sizes of nested dictionaries before the whole one, each of which has to reconstruct."""

    def __init__(self, d_in: int, d_sae: int, k: int):
        super().__init__()
        if not 1 <= k <= d_sae:
            raise ValueError(f"k must be between 1 and d_sae={d_sae}, got k={k}. Pass --sae.k.")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        if not self.is_tied:
            # Stored latent by latent: a step reads and writes whole rows of the few active latents.
            self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, dtype=torch.float32).T)
            self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=torch.float32))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in, dtype=torch.float32))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=torch.float32))

    @torch.no_grad()
    def initialise_(
        self, sample_ND: Float[Tensor, "rows d_in"], generator: torch.Generator, b_dec: str = "mean"
    ) -> None:
        """Random unit decoder rows, encoder its transpose, b_dec the centre of a sample, so training starts mean-centred.

        `b_dec` is "mean" or "geometric_median" (which outlying rows move less).
        """
        sample_ND = sample_ND.float()
        self.b_dec.copy_(sample_ND.mean(0) if b_dec == "mean" else geometric_median(sample_ND))
        self.W_dec.copy_(torch.randn(self.W_dec.shape, generator=generator))
        self.normalise_decoder_()
        self.initialise_encoder_(sample_ND[:1024])

    def initialise_encoder_(self, x_ND: Float[Tensor, "rows d_in"]) -> None:
        """The decoder's transpose, scaled so that reconstructions of these rows are best in the sense of least squares."""
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.calibrate_(x_ND)
        centred, reconstructed = x_ND - self.b_dec, self.decode(self(x_ND)) - self.b_dec
        self.W_enc.mul_((centred * reconstructed).sum() / reconstructed.square().sum().clamp_min(1e-12))
        self.calibrate_(x_ND)

    def rows_of(self, h: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """What the SAE takes of activations, in float32 or wider: a division by each token's own deviation cannot be folded into weights."""
        return standardise(h) if self.standardises else (h if h.dtype == torch.float64 else h.float())

    def forward(self, x: Float[Tensor, "batch d_in"] | Codes) -> Codes | Tensor:
        """Encode rows, or decode codes."""
        return self.decode(x) if isinstance(x, Codes) else self.encode(x)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        """The codes of rows, as `rows_of` makes them."""
        # Autocast and 16-bit weights would leave latents tied at the k-th value (SARM, implementation notes).
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.W_enc.dtype)
            values, indices = _Encode.apply(x - self.b_dec, self.W_enc.T, self.b_enc, self.activate)
        return Codes(values, indices)

    @abstractmethod
    def activate(self, pre_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values and indices of each row's active latents, by descending absolute value, and where the gradient passes."""

    def rule(self, share: Share) -> Rule | None:
        """Which latents are active in a training step; None where a step reconstructs by `pursue`."""
        raise NotImplementedError(f"a {self.architecture} SAE is not trained as a dictionary.")

    def pursue(self, x_BD: Tensor, share: Share) -> tuple[Reconstruction, Tensor]:
        """A training step's reconstruction without AuxK, and what is left of the rows [B, D], where no rule selects latents at once."""
        raise NotImplementedError(f"a {self.architecture} SAE selects latents by a rule.")

    def aux_rule(self, aux_k: int, share: Share) -> Rule:
        """Which dead latents reconstruct the error (AuxK, Gao et al. 2024, appendix A.2): the strongest."""
        return TopKRule(share.num_rows, aux_k, group=share.latent_group)

    def penalty(self, l0_B: Tensor, share: Share) -> Tensor | None:
        """What is added to the loss for active latents; None: nothing."""
        return None

    def after_step_(self, rule: Rule | None) -> None:
        """What an optimizer step leaves to be done."""

    def describe(self) -> dict[str, Any]:
        """What `build_sae` needs besides the sizes to make the same SAE again, as JSON values."""
        values = {name: getattr(self, name) for name in self.options}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"architecture": self.architecture, **listed}

    def calibrate_(self, x_ND: Float[Tensor, "rows d_in"]) -> None:
        """Fit what the architecture has beside the four parameters to a sample, under the initial encoder."""

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
        unit_D = self._shift_direction(rows_ND)
        self.W_enc.sub_(torch.outer(unit_D, unit_D @ self.W_enc))
        self.W_enc[:, latent] = unit_D
        self.W_dec[latent] = unit_D
        self.b_enc[latent] = 0.0

    def _shift_direction(self, rows_ND: Tensor) -> Tensor:
        shift_D = rows_ND.to(self.b_dec.dtype).mean(0) - self.b_dec
        direction_D: Tensor = shift_D / shift_D.norm().clamp_min(1e-12)
        return direction_D

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Give every decoder row unit norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Take out of the decoder's gradient what would only change row norms, since normalising undoes it but Adam's moments keep it."""
        if self.W_dec.grad is not None:
            # Some rows at a time: the product would else be another tensor of the decoder's size.
            for gradient, rows in zip(self.W_dec.grad.split(1024), self.W_dec.split(1024), strict=True):
                gradient.addcmul_((gradient * rows).sum(dim=1, keepdim=True), rows, value=-1.0)


def geometric_median(x_ND: Float[Tensor, "rows d_in"], steps: int = 32) -> Float[Tensor, " d_in"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration from their mean."""
    x_ND = x_ND.double()
    median_D = x_ND.mean(0)
    for _ in range(steps):
        weights_N = (x_ND - median_D).norm(dim=1).clamp_min(1e-9).reciprocal()
        median_D = weights_N @ x_ND / weights_N.sum()
    return median_D.float()


def dense(codes: Codes, d_sae: int) -> Float[Tensor, "batch d_sae"]:
    """The codes as a B x S tensor, for small batches and tests."""
    full = torch.zeros(codes.values.shape[0], d_sae, dtype=codes.values.dtype, device=codes.values.device)
    return full.scatter_add_(1, codes.indices, codes.values)
