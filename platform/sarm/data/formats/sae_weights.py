"""An SAE apart from any library: what every format can be read into and written from.

N rows, D d_in, S d_sae.  pre = (x - b_dec) W_enc + b_enc;  z = rule(pre);  x_hat = z W_dec + b_dec.
Other conventions are folded into this one in float64, so that what a fold costs is one rounding to float32.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sarm.nn.architectures import build_sae
from sarm.nn.sae import Sae
from sarm.settings.checks import UserError

STANDARDISED = "standardise(residual), float32"
RESIDUAL = "residual"


@dataclass(frozen=True)
class SaeWeights:
    """Weights in float32, and how pre-activations become codes.

    `rule` is an architecture's `exported_as`: "topk" and "signed_topk" (without a ReLU) are TopK with `k`, by "jumprelu" all latents
    above their `threshold` are active, and only then there is one. `input` says what rows the SAE was made for: `STANDARDISED` or
    `RESIDUAL`. `metadata` is what the file said of its origin, and under `sae` of its training.
    """

    # W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in), threshold (d_sae): a file may hold other shapes, which `checked`
    # refuses with the file's name, so the annotations do not.
    W_enc: Float[Tensor, "..."]
    b_enc: Float[Tensor, "..."]
    W_dec: Float[Tensor, "..."]
    b_dec: Float[Tensor, "..."]
    # An int or None once it is `checked`.
    k: Any = None
    threshold: Float[Tensor, "..."] | None = None
    rule: str = "topk"
    input: str = STANDARDISED
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The weights by SAELens' names, contiguous in float32."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        named |= {} if self.threshold is None else {"threshold": self.threshold}
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in named.items()}

    def checked(self, origin: str) -> "SaeWeights":
        """The same in float32.

        Raises UserError, naming `origin`, unless shapes fit each other, every weight is finite and a rule that counts latents has a usable k.
        """
        tensors = self.tensors()
        d_in, d_sae = self.W_enc.shape if self.W_enc.dim() == 2 else (0, 0)
        wanted = {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_in),
            "b_dec": (d_in,),
            "threshold": (d_sae,),
        }
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if wrong := [f"{name} {found[name]}" for name in found if found[name] != wanted[name] or not d_sae]:
            raise UserError(
                f"{origin} holds {', '.join(wrong)}, which does not fit W_enc {found['W_enc']}. The file is not this format's."
            )
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(
                    f"{origin} holds NaN or infinite values in {name}. The SAE is broken; get another copy or train it again."
                )
        k = self.k
        if k is not None and (isinstance(k, bool) or not isinstance(k, (int, float)) or k % 1 != 0):
            raise UserError(f"{origin} gives k={k!r}, which is no number of latents. Get another copy.")
        if self.rule != "jumprelu" and not (k is not None and 1 <= k <= d_sae):
            advice = "Pass --k." if k is None else "Pass --k, or get another copy."
            raise UserError(f"k must be between 1 and d_sae={d_sae}, {origin} gives k={k}. {advice}")
        named: dict[str, Any] = dict(tensors)
        return replace(self, **named, k=None if k is None else int(k))

    def without_input_bias(self) -> Float[Tensor, " d_sae"]:
        """The encoder bias of the same SAE written as x W_enc + b: b_enc - b_dec W_enc.

        Exact for every SAE, since the pre-activations are the same sum.
        """
        return (self.b_enc.double() - self.b_dec.double() @ self.W_enc.double()).float()


def with_input_bias(
    b_enc: Float[Tensor, " d_sae"], b_dec: Float[Tensor, " d_in"], W_enc: Float[Tensor, "d_in d_sae"]
) -> Float[Tensor, " d_sae"]:
    """The inverse of `without_input_bias`: the encoder bias once b_dec is taken off the input, b_enc + b_dec W_enc."""
    return (b_enc.double() + b_dec.double() @ W_enc.double()).float()


def with_unit_decoder(weights: SaeWeights) -> SaeWeights:
    """The SAE that selects latents by pre-activation times decoder norm and reports them so scaled, with the norms folded.

    W_enc and b_enc times the norms, W_dec over them (SAELens' `rescale_acts_by_decoder_norm`). A latent without a decoder
    direction keeps norm 1, and then never wins, as before.
    """
    norms_S = weights.W_dec.double().norm(dim=1)
    divisors_S = torch.where(norms_S > 0, norms_S, 1.0)
    return replace(
        weights,
        W_enc=(weights.W_enc.double() * norms_S).float(),
        b_enc=(weights.b_enc.double() * norms_S).float(),
        W_dec=(weights.W_dec.double() / divisors_S[:, None]).float(),
    )


def without_gate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gated SAE (Rajamanoharan et al. 2024a) as the JumpReLU that it equals, by SAELens' names: W_enc, b_enc and threshold.

    z = relu(q) where p + b_gate > 0, with p = x W_enc and q = exp(r_mag) p + b_mag. The gate is open where q > b_mag - exp(r_mag) b_gate.
    """
    scale_S = tensors["r_mag"].double().exp()
    b_mag_S, b_gate_S = tensors["b_mag"].double(), tensors["b_gate"].double()
    kept = {name: tensors[name] for name in ("W_dec", "b_dec")}
    threshold_S = (b_mag_S - scale_S * b_gate_S).float()
    return {
        **kept,
        "W_enc": (tensors["W_enc"].double() * scale_S).float(),
        "b_enc": b_mag_S.float(),
        "threshold": threshold_S,
    }


def weights_of(sae: Sae, metadata: dict[str, Any]) -> SaeWeights:
    """The weights of an SAE in memory; `metadata` travels with them, and how the SAE was trained under `sae`."""
    return SaeWeights(
        sae.W_enc.detach(),
        sae.b_enc.detach(),
        sae.W_dec.detach(),
        sae.b_dec.detach(),
        k=sae.k,
        threshold=sae.state_dict().get("threshold"),
        rule=sae.exported_as,
        input=STANDARDISED if sae.standardises else RESIDUAL,
        metadata={"sae": {"architecture": sae.architecture, "k": sae.k, **sae.describe()}, **metadata},
    )


def sae_of(weights: SaeWeights) -> Sae:
    """The SAE with these weights: as it was trained if they say so, else the architecture of their rule.

    Raises UserError if they say that they were trained as what they are not.
    """
    signed = {"architecture": "topk", "signed": True}
    plain = signed if weights.rule == "signed_topk" else {"architecture": weights.rule}
    # A reader of thresholds has no use for k, which only training aims at.
    kind = {"k": weights.k or 1, **(weights.metadata.get("sae") or plain)}
    try:
        sae = build_sae(d_in=weights.d_in, d_sae=weights.d_sae, **kind)
    except (ValueError, TypeError) as error:
        raise UserError(f"the SAE says that it was trained as {kind}, which cannot be: {error}") from error
    if sae.exported_as != weights.rule:
        raise UserError(f"the SAE says that it was trained as {kind}, and its weights are those of {weights.rule}. Get another copy.")  # fmt: skip
    tensors = weights.tensors()
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            tensor.copy_(tensors[name])
    sae.standardises = weights.input == STANDARDISED
    return sae
