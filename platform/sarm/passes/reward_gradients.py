"""Rewards of a classifier beside what edits of its dictionary's codes do to them: by patching, and to first order.

patched  r(h + change(h)) - r(h), with the change at the dictionary's layer, and everything behind it computed again
linear   sum over the edited tokens t of g_t . change(h)_t, with g = dr / dh at that layer: what patching is to first order (attribution patching)
head     w_i = mean over the answers at whose rewarded token latent i fires of s (g . d_i), d_i row i of W_dec, s the token's deviation where the SAE
         standardises, else 1: w_i z_i is to first order what latent i adds at the rewarded token
term     s (g . d_i) z_i, of each token and active latent: minus what suppressing the latent there does to the reward, to first order

Rows hold one conversation each, padded on the right: no token that is read can see the padding. B rows, L columns, D d_in, S d_sae.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sarm.nn.sae import STANDARDISE_EPS, Codes, Sae
from sarm.passes.attached_model import AttachedModel

_TOKENS_AT_ONCE = 64


@runtime_checkable
class Intervention(Protocol):
    """What is done to the residual stream: the change of each token's activation (`sarm.nn.splice.Splice`)."""

    def change(self, h_ND: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]: ...


class Conversations(NamedTuple):
    """Token ids of conversations [B, L], padded on the right; of each [B] its rewarded column, and the one where a gate reads its prompt."""

    input_ids: Int[Tensor, "rows columns"]
    last: Int[Tensor, " rows"]
    gates: Int[Tensor, " rows"] | None = None

    @property
    def is_token(self) -> Bool[Tensor, "rows columns"]:
        """Where there are tokens and no padding."""
        order = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        is_token_BL: Tensor = order <= self.last[:, None]
        return is_token_BL

    @property
    def is_rewarded(self) -> Bool[Tensor, "rows columns"]:
        """The rewarded token of each row."""
        order = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        is_rewarded_BL: Tensor = order == self.last[:, None]
        return is_rewarded_BL


class Effects(NamedTuple):
    """Of each row its reward [B], and of each edit [B, E] the change by patching and its linear approximation, in reward units."""

    reward: Float[Tensor, " rows"]
    patched: Float[Tensor, "rows edits"]
    linear: Float[Tensor, "rows edits"]


def gradients(
    model: AttachedModel, batch: Conversations
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows columns d_in"], Float[Tensor, "rows columns d_in"]]:
    """(r, h, g): rewards, activations at the dictionary's layer, and the gradient of each row's reward by its own activations."""
    reward_B, (h_BLD,), (gradient_BLD,) = stream_gradients(model.body, [model.layer], functools.partial(_rewards, model, batch))  # fmt: skip
    return reward_B, h_BLD, gradient_BLD


def stream_gradients(
    body: Any, layers: Sequence[int], rewards: Callable[[], Float[Tensor, " rows"]]
) -> tuple[Float[Tensor, " rows"], list[Float[Tensor, "rows columns d_in"]], list[Float[Tensor, "rows columns d_in"]]]:
    """(r, h, g) of one pass of `rewards` through `body`: the rewards, and after each of `layers` (each once) the activations and the gradients by them.

    Of two layers the gradient by the lower one counts what it does through the upper one.
    """
    kept: dict[int, Tensor] = {}

    def keep(hidden: Tensor, layer: int) -> Tensor:
        # The graph begins at the lowest: blocks before it are not kept.
        kept[layer] = hidden.detach().requires_grad_() if layer == min(layers) else hidden
        return kept[layer]

    with torch.enable_grad(), _streams(body, {layer: functools.partial(keep, layer=layer) for layer in layers}):
        reward_B = rewards()
        found = torch.autograd.grad(reward_B.sum(), [kept[layer] for layer in layers])
    return reward_B.detach(), [kept[layer].detach() for layer in layers], [one.detach() for one in found]


def reward_at(
    model: AttachedModel, batch: Conversations, h_BLD: Float[Tensor, "rows columns d_in"], *, needs_slope: bool = True
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows columns d_in"]]:
    """(r, g) with these activations at the dictionary's layer in the place of the model's own; g is zeros unless it is needed."""
    put_BLD: Tensor | None = None

    def put(hidden: Tensor) -> Tensor:
        nonlocal put_BLD
        put_BLD = h_BLD.detach().to(hidden.dtype).requires_grad_(needs_slope)
        return put_BLD

    with torch.set_grad_enabled(needs_slope), _streams(model.body, {model.layer: put}):
        reward_B = _rewards(model, batch)
        assert put_BLD is not None
        slope_BLD = torch.autograd.grad(reward_B.sum(), put_BLD)[0] if needs_slope else torch.zeros_like(put_BLD)
    return reward_B.detach(), slope_BLD.detach()


@torch.no_grad()
def slopes(
    sae: Sae, codes: Codes, h_ND: Float[Tensor, "tokens d_in"], gradient_ND: Float[Tensor, "tokens d_in"]
) -> Float[Tensor, "tokens k"]:
    """s (g . d_i) of each token and each latent of its codes: the slope of the reward by the latent's value."""
    # In parts, so that no tensor of all tokens x k x d_in is made.
    parts = zip(gradient_ND.float().split(_TOKENS_AT_ONCE), codes.indices.split(_TOKENS_AT_ONCE), strict=True)
    slope_NK = torch.cat([torch.einsum("nd,nkd->nk", own_ND, sae.W_dec[indices_NK]) for own_ND, indices_NK in parts])
    return slope_NK * (h_ND.float().std(-1, keepdim=True) + STANDARDISE_EPS) if sae.standardises else slope_NK


def effects(model: AttachedModel, batch: Conversations, edits: Sequence[tuple[Intervention, Tensor]]) -> Effects:
    """What each (intervention, its tokens [B, L]) does to the rewards."""
    reward_B, h_BLD, gradient_BLD = gradients(model, batch)
    h_ND = h_BLD.flatten(0, 1)
    patched, linear = [], []
    for edit, places_BL in edits:
        change_BLD = torch.zeros(h_BLD.shape, dtype=torch.float32, device=h_BLD.device)
        chosen = places_BL.flatten().nonzero().flatten()
        change_BLD.flatten(0, 1)[chosen] = edit.change(h_ND[chosen])
        with torch.no_grad(), _streams(model.body, {model.layer: functools.partial(_added, change_BLD)}):
            after_B = _rewards(model, batch)
        patched.append(after_B - reward_B)
        linear.append((gradient_BLD.float() * change_BLD).sum((1, 2)))
    none = reward_B.new_zeros(len(reward_B), 0)
    return Effects(reward_B, torch.stack(patched, 1) if patched else none, torch.stack(linear, 1) if linear else none)


def linear_head(model: AttachedModel, batches: Iterable[Conversations]) -> tuple[Float[Tensor, " d_sae"], Int[Tensor, " d_sae"]]:  # fmt: skip
    """w of every latent, 0 for one that never fires, and the number of answers at whose rewarded token each fires."""
    sums_S = torch.zeros(model.sae.d_sae, dtype=torch.float64)
    counts_S = torch.zeros(model.sae.d_sae, dtype=torch.long)
    for batch in batches:
        _, h_BLD, gradient_BLD = gradients(model, batch)
        rows = torch.arange(len(h_BLD), device=h_BLD.device)
        h_BD, gradient_BD = h_BLD[rows, batch.last].float(), gradient_BLD[rows, batch.last].float()
        with torch.no_grad():
            codes: Codes = model.sae(model.sae.rows_of(h_BD))
            fires_BK = codes.values != 0
            slope_BK = slopes(model.sae, codes, h_BD, gradient_BD)
        latents = codes.indices[fires_BK].cpu()
        sums_S.index_add_(0, latents, slope_BK[fires_BK].double().cpu())
        counts_S.index_add_(0, latents, torch.ones_like(latents))
    return (sums_S / counts_S.clamp_min(1)).float(), counts_S


def _added(change: Tensor, hidden: Tensor) -> Tensor:
    """Activations with a change added to them, in their own dtype."""
    return (hidden + change).to(hidden.dtype)


@contextlib.contextmanager
def _streams(body: Any, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within it, activations after these blocks are what the functions make of them."""

    def hook(_block: Any, _inputs: Any, output: Any, change: Callable[[Tensor], Tensor]) -> Any:
        changed = change(output if isinstance(output, Tensor) else output[0])
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    handles = [
        body.get_submodule(f"layers.{layer - 1}").register_forward_hook(functools.partial(hook, change=change))
        for layer, change in changes.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rewards(model: AttachedModel, batch: Conversations) -> Tensor:
    """Rewards of a plain pass."""
    last_BLD = model.body(input_ids=batch.input_ids, attention_mask=batch.is_token.long(), use_cache=False).last_hidden_state  # fmt: skip
    rows = torch.arange(len(last_BLD), device=last_BLD.device)
    at_gate = None if batch.gates is None else last_BLD[rows, batch.gates]
    rewards_B: Tensor = model.head(last_BLD[rows, batch.last], at_gate)
    return rewards_B
