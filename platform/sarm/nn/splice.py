"""Features of SAEs edited inside a model's forward pass; what the SAEs do not explain is passed on as it is.

h' = h + s (decode(z') - decode(z)) = h + s sum_i (z'_i - z_i) w_i  over the edited latents i,  z'_i = a_i z_i + c_i
h is the residual stream after a block, z the codes of the SAE's rows (`Sae.rows_of`), w_i row i of W_dec. Where the SAE takes standardised
activations, s is the token's own deviation plus 1e-6, so that the change is in the residual's units; the token's mean cancels out. Where it
takes activations as they are, s = 1. Whatever x_hat leaves out is in both terms and cancels too, so no latent edited is h to the bit.

suppress  a = 0, c = 0        scale by f  a = f, c = 0        clamp at v  a = 0, c = v, at every token, also where the latent is silent
N tokens, B rows, L columns, D d_in, K active latents, E edited latents.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .jumprelu import JumpReluSae
from .precision import deciding
from .sae import STANDARDISE_EPS, Sae
from .thresholds import ThresholdSae
from .topk import TopKSae

Kind = Literal["suppress", "scale", "clamp"]
Positions = Literal["all", "answer", "rewarded"]
KINDS: tuple[Kind, ...] = get_args(Kind)
POSITIONS: tuple[Positions, ...] = get_args(Positions)
# Pre-activations at once, so that long batches make no tensor of tokens x d_sae.
_PRE_AT_ONCE = 2**25


class LatentEdit(NamedTuple):
    """What becomes of one latent: `value` is the factor of `scale` and the new value of `clamp`, in the unit of codes."""

    latent: int
    kind: Kind = "suppress"
    value: float = 0.0


class Splice:
    """An SAE at the output of block `layer` (`hidden_states[layer]`), and what it edits there.

    Of an SAE whose latents do not compete (thresholds) only the edited ones are kept, since the others change nothing. `own_latents` are the
    edited ones by their numbers in `sae`, `edits` has them as the whole SAE numbers them.

    Raises ValueError for a latent that the SAE lacks or that is edited twice, and for an edit that is none.
    """

    def __init__(self, sae: Sae, layer: int, edits: Sequence[LatentEdit]):
        _check(edits, sae.d_sae)
        latents = [edit.latent for edit in edits]
        if isinstance(sae, ThresholdSae):
            self._set(_of_latents(sae, latents), layer, edits, range(len(edits)))
        else:
            self._set(sae, layer, edits, latents)

    @classmethod
    def of_rows(cls, sae: Sae, layer: int, edits: Sequence[LatentEdit]) -> "Splice":
        """The splice of an SAE that is already cut to what the edits need, as a file holds it. Raises ValueError as the class does."""
        is_cut = isinstance(sae, ThresholdSae)
        # Numbers of latents that were cut away say nothing of what is left.
        _check(edits, None if is_cut else sae.d_sae)
        if is_cut and sae.d_sae != max(1, len(edits)):
            raise ValueError(f"{sae.d_sae} latents are left of the SAE at layer {layer}, and {len(edits)} are edited.")
        splice = cls.__new__(cls)
        splice._set(sae, layer, edits, range(len(edits)) if is_cut else [edit.latent for edit in edits])
        return splice

    def _set(self, sae: Sae, layer: int, edits: Sequence[LatentEdit], own: Sequence[int]) -> None:
        self.sae, self.layer, self.edits, self.own_latents = sae, layer, tuple(edits), list(own)
        self._own_E = torch.tensor(self.own_latents, dtype=torch.long)
        self._factor_E = torch.tensor([edit.value if edit.kind == "scale" else 0.0 for edit in edits])
        self._added_E = torch.tensor([edit.value if edit.kind == "clamp" else 0.0 for edit in edits])

    @torch.no_grad()
    def change(self, h_ND: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """h' - h of activations, in float32 or wider."""
        self._to(h_ND.device)
        wide_ND = h_ND if h_ND.dtype == torch.float64 else h_ND.float()
        parts = [self._change(part) for part in wide_ND.split(max(1, _PRE_AT_ONCE // self.sae.d_sae))]
        return torch.cat(parts) if parts else torch.zeros_like(wide_ND)

    @torch.no_grad()
    def steps(self, h_ND: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens edited"]:
        """s (z' - z) of the edited latents, whose sum over `directions` is the change."""
        self._to(h_ND.device)
        wide_ND = h_ND if h_ND.dtype == torch.float64 else h_ND.float()
        parts = []
        for part_ND in wide_ND.split(max(1, _PRE_AT_ONCE // self.sae.d_sae)):
            z_NE = self._values(self.sae.rows_of(part_ND))
            step_NE = (self._factor_E.to(z_NE) - 1) * z_NE + self._added_E.to(z_NE)
            unit_N1 = part_ND.std(-1, keepdim=True) + STANDARDISE_EPS if self.sae.standardises else 1.0
            parts.append((step_NE * unit_N1).to(wide_ND.dtype))
        return torch.cat(parts) if parts else wide_ND.new_zeros(0, len(self.edits))

    @property
    def directions(self) -> Float[Tensor, "edited d_in"]:
        """The decoder rows of the edited latents."""
        return self.sae.W_dec.detach()[self._own_E]

    def _change(self, h_ND: Tensor) -> Tensor:
        change_ND = torch.zeros_like(h_ND)
        x_ND = self.sae.rows_of(h_ND)
        moved = self._moved(x_ND)
        if not len(moved):
            return change_ND
        z_NE = self._values(x_ND[moved])
        step_NE = (self._factor_E.to(z_NE) - 1) * z_NE + self._added_E.to(z_NE)
        step_ND = (step_NE @ self.sae.W_dec[self._own_E]).to(h_ND.dtype)
        if self.sae.standardises:
            step_ND = step_ND * (h_ND[moved].std(-1, keepdim=True) + STANDARDISE_EPS)
        change_ND[moved] = step_ND
        return change_ND

    def _moved(self, x_ND: Tensor) -> Tensor:
        """The tokens whose codes have to be looked at: under TopK an edited latent is silent wherever its pre-activation is not positive."""
        may_skip = isinstance(self.sae, TopKSae) and not self.sae.signed and not bool(self._added_E.any())
        if not may_skip:
            return torch.arange(len(x_ND), device=x_ND.device)
        sae = self.sae
        with deciding():
            centred_ND = x_ND.to(sae.W_enc.dtype) - sae.b_dec
            pre_NE = centred_ND @ sae.W_enc[:, self._own_E] + sae.b_enc[self._own_E]
        # Other products round otherwise: what is a little below 0 here may be a little above it there.
        moved: Tensor = (pre_NE > -1e-4).any(-1).nonzero().flatten()
        return moved

    def _values(self, x_ND: Tensor) -> Tensor:
        """Codes [N, E] of the edited latents."""
        codes = self.sae(x_ND)
        num = len(self._own_E)
        place_S = torch.full((self.sae.d_sae,), num, device=x_ND.device)
        place_S[self._own_E] = torch.arange(num, device=x_ND.device)
        z_NE: Tensor = codes.values.new_zeros(len(x_ND), num + 1)
        z_NE.scatter_add_(1, place_S[codes.indices], codes.values)
        return z_NE[:, :num]

    def _to(self, device: torch.device) -> None:
        if self._own_E.device != device:
            self.sae = self.sae.to(device)
            self._own_E, self._factor_E, self._added_E = (
                tensor.to(device) for tensor in (self._own_E, self._factor_E, self._added_E)
            )


def check_sites(splices: Sequence[Splice], num_blocks: int, d_in: int, model: str = "the model") -> None:
    """Raise ValueError unless every splice is at one of the blocks, once, and its SAE is as wide as the residual stream."""
    layers = [splice.layer for splice in splices]
    for splice in splices:
        if not 1 <= splice.layer <= num_blocks:
            raise ValueError(f"layer {splice.layer} is none of {model}, which has {num_blocks} blocks. Edit layers 1 to {num_blocks}.")  # fmt: skip
        if splice.sae.d_in != d_in:
            raise ValueError(f"the SAE at layer {splice.layer} takes activations of width {splice.sae.d_in}, {model} has {d_in}. Pass an SAE of this model.")  # fmt: skip
        if layers.count(splice.layer) > 1:
            raise ValueError(f"layer {splice.layer} is edited twice. Pass all its latents as one edit.")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model of `transformers`, in order, whether it is a body or has a head.

    Raises ValueError for one in which no list of modules is as long as its config says that it is deep.
    """
    base: Any = getattr(model, "base_model", model)
    own = getattr(base, "layers", None)
    if isinstance(own, nn.ModuleList):
        return own
    depth = getattr(base.config, "num_hidden_layers", None)
    for _, part in sorted(base.named_modules(), key=lambda named: named[0].count(".")):
        if isinstance(part, nn.ModuleList) and len(part) == depth:
            return part
    raise ValueError(f"{type(base).__name__} has no list of {depth} blocks to edit between. Pass another model.")


def edited_output(splice: Splice, output: Any, places: Tensor | None = None) -> Any:
    """What a block gives with its features edited, at all tokens or at `places` [B, L]."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    h_ND = hidden.reshape(-1, hidden.shape[-1])
    if places is None:
        changed_ND = (h_ND + splice.change(h_ND)).to(hidden.dtype)
    else:
        chosen = places.reshape(-1).nonzero().flatten()
        changed_ND = h_ND.clone()
        changed_ND[chosen] = (h_ND[chosen] + splice.change(h_ND[chosen])).to(hidden.dtype)
    changed = changed_ND.view_as(hidden)
    return changed if isinstance(output, Tensor) else (changed, *output[1:])


class Editing:
    """The splices of a model while they are there. `places` [B, L] are the tokens of the next forward pass that are edited; None: all."""

    def __init__(self, model: nn.Module, splices: Sequence[Splice]):
        blocks = blocks_of(model)
        config: Any = getattr(model, "base_model", model).config
        check_sites(splices, len(blocks), config.hidden_size)
        self.places: Bool[Tensor, "rows columns"] | None = None
        # Without an edited latent nothing is hooked, and the pass is the plain one to the bit.
        self._handles = [
            blocks[splice.layer - 1].register_forward_hook(self._hook(splice)) for splice in splices if splice.edits
        ]

    def _hook(self, splice: Splice) -> Any:
        return lambda _block, _inputs, output: edited_output(splice, output, self.places)

    def remove(self) -> None:
        """Give the model back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


@contextlib.contextmanager
def edited(model: nn.Module, splices: Sequence[Splice], places: Tensor | None = None) -> Iterator[Editing]:
    """The model with its features edited at all tokens, or at `places` [B, L]. Raises ValueError as `check_sites` and `blocks_of` do."""
    editing = Editing(model, splices)
    editing.places = places
    try:
        yield editing
    finally:
        editing.remove()


def _check(edits: Sequence[LatentEdit], d_sae: int | None) -> None:
    latents = [edit.latent for edit in edits]
    for edit in edits:
        if edit.latent < 0 or (d_sae is not None and edit.latent >= d_sae):
            raise ValueError(f"latent {edit.latent} is none of the SAE's {d_sae}. Edit latents from 0 on.")
        if latents.count(edit.latent) > 1:
            raise ValueError(f"latent {edit.latent} is edited twice. Edit it once.")
        if edit.kind not in KINDS:
            raise ValueError(f"an edit must be one of {', '.join(KINDS)}, got {edit.kind!r}.")
        if not math.isfinite(edit.value):
            raise ValueError(f"latent {edit.latent} is to be set to {edit.value}, expected a finite number.")


@torch.no_grad()
def _of_latents(sae: ThresholdSae, latents: Sequence[int]) -> Sae:
    """The SAE of these latents alone: where each has a threshold, its codes do not depend on the others."""
    few = JumpReluSae(sae.d_in, max(1, len(latents)), 1).to(sae.W_dec)
    rows = list(latents) or [0]
    few.W_enc.copy_(sae.W_enc[:, rows])
    few.b_enc.copy_(sae.b_enc[rows])
    few.W_dec.copy_(sae.W_dec[rows])
    few.b_dec.copy_(sae.b_dec)
    few.threshold.copy_(sae.threshold[rows])
    few.standardises = sae.standardises
    return few
