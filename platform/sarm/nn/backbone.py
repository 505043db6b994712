"""The first `layer` blocks of a causal language model: token ids in, raw residual stream after block `layer` out.

B rows, L columns. Several answers to one prompt may share a row: segment 0 is the shared prompt, segments 1, 2, ... the
answers, -1 padding. A token sees its own segment and segment 0 up to itself, and positions restart at each answer, so
every answer is computed as if it stood alone after the prompt. Several prompts may share a row too: the b-th has its
segments in the block from b * SEGMENTS_PER_BLOCK on, which begins with its shared prompt.

A branch is a leaf behind a token of an answer (or of the shared prompt): it sees what that token sees, and nobody sees it. The m-th branch
of segment s is segment s + m * ANSWERS_PER_BLOCK, and its positions go on from that token's. So a row holds the ends of turn behind many
beginnings of an answer, each as if the answer stopped there.

A family whose blocks keep a state along a row, as recurrent ones do, knows no segments: its rows are taken apart, and every answer is read
behind its prompt as a sequence of its own (`sarm.nn.rows_apart`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .attention import (
    DENSE_TOKENS,
    block_mask,
    flex_works,
    makes_mask,
    part_mask,
    takes_every_mask_,
    whole_mask,
)
from .rows_apart import aligned, as_sequences, in_shorter_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Family(NamedTuple):
    """What the backbone has to know of a family of models."""

    mask_per_layer_kind: bool = False
    """Whether its blocks take a mask for each kind of layer (full, sliding) instead of one for all."""
    alone: bool = False
    """Whether a row may hold one sequence alone: the blocks keep a state, or count tokens from the row's beginning."""
    final_norm: str = "norm"
    """What the model calls the norm behind its last block."""


# By `model_type`: those whose residual stream was checked against `hidden_states[layer]`.
_ONE_MASK = """
llama mistral gemma apertus arcee cohere deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe glm glm4 glm4_moe
granite granitemoe granitemoeshared helium hunyuan_v1_dense internlm3 minimax_m2 ministral3 mixtral nemotron
olmo olmo2 olmoe phi3 phimoe qwen3_moe seed_oss stablelm starcoder2
"""
_MASK_PER_LAYER_KIND = """
cohere2 cwm dots1 exaone4 gemma2 gemma3_text gemma4_text gpt_oss ministral olmo3 qwen2 qwen2_moe qwen3 smollm3
vaultgemma
"""
_ALONE = "llama4_text olmo_hybrid qwen3_next qwen3_5_text qwen3_5_moe_text"
FAMILIES: dict[str, Family] = {
    **{name: Family() for name in _ONE_MASK.split()},
    **{name: Family(mask_per_layer_kind=True) for name in _MASK_PER_LAYER_KIND.split()},
    **{name: Family(alone=True) for name in _ALONE.split()},
    "phi": Family(final_norm="final_layernorm"),
    "lfm2": Family(alone=True, final_norm="embedding_norm"),
    "falcon_h1": Family(alone=True, final_norm="final_layernorm"),
}
# Why others cannot be right.
REFUSED = {
    "gemma3n_text": "whose blocks carry several copies of the residual stream, of which none is it",
    "internlm2": "whose blocks and tokenizer are code of its own in the checkpoint, which is not run",
}


def family_of(config: "PretrainedConfig") -> Family:
    """What is known of the config's family; of one that is not listed, as an exported model's may be, what most are."""
    return FAMILIES.get(config.model_type, Family())


def attention_of(config: "PretrainedConfig") -> str:
    """How attention is computed: by the SDPA kernels, unless they leave out what the family needs (soft caps, sinks)."""
    from transformers import MODEL_MAPPING

    has_softcap = bool(getattr(config, "attn_logit_softcapping", None))
    kind: Any = MODEL_MAPPING[type(config)]
    return "sdpa" if kind._supports_sdpa and not has_softcap else "eager"


def without_final_norm(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same model ending in its raw residual stream (SARM section 3: the SAE reads it, and normalises by itself)."""
    setattr(model, family_of(model.config).final_norm, nn.Identity())
    if hasattr(model.config, "quantization_config"):
        # Weights were dequantised on loading, and are saved as what they are.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
    return model


def restore_scales_(model: "PreTrainedModel") -> None:
    """Compute Falcon H1's vectors of scales from its config, which `transformers` forgets where the model is a part of another.

    They are in no file. What it forgets holds whatever the memory held.
    """
    if model.config.model_type == "falcon_h1":
        model._init_weights(model)


def residual_stream(
    model: "PreTrainedModel",
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"],
    segments: Int[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns d_in"]:
    """Residual stream after the last kept block at every token."""
    arranged = _arranged(model, input_ids, positions, segments)
    hidden: Tensor = model(**arranged.inputs, use_cache=False).last_hidden_state
    return hidden if arranged.rows is None else hidden[arranged.rows, arranged.columns]


def residuals_at(
    model: "PreTrainedModel",
    layers: Sequence[int],
    rows: Int[Tensor, " taken"],
    columns: Int[Tensor, " taken"],
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"] | None = None,
    segments: Int[Tensor, "rows columns"] | None = None,
) -> list[Float[Tensor, "taken d_in"]]:
    """Residual stream after each of `layers` (`hidden_states[layer]`, without the final norm) at (`rows[n]`, `columns[n]`), from one pass.

    Without segments every row is one sequence, padded on the right if at all: no token that is taken can see the padding, so no mask is
    made and attention takes its causal kernel.
    """
    if segments is None:
        arranged = _Arranged(_of_one_sequence(model, input_ids))
    else:
        assert positions is not None
        arranged = _arranged(model, input_ids, positions, segments)
    return _at(model, layers, rows, columns, arranged)[0]


def streams_at(
    model: "PreTrainedModel",
    layer: int,
    rows: Int[Tensor, " taken"],
    columns: Int[Tensor, " taken"],
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"],
    segments: Int[Tensor, "rows columns"],
) -> tuple[Float[Tensor, "taken d_in"], Float[Tensor, "taken d_in"]]:
    """Of a whole model with its final norm: the residual stream after block `layer`, and the last hidden state, at (`rows[n]`, `columns[n]`)."""
    arranged = _arranged(model, input_ids, positions, segments)
    (stream_ND,), last_ND = _at(model, [layer], rows, columns, arranged)
    return stream_ND, last_ND


def _at(
    model: "PreTrainedModel", layers: Sequence[int], rows: Tensor, columns: Tensor, arranged: "_Arranged"
) -> tuple[list[Tensor], Tensor]:
    """The residual stream after each of `layers`, and what the model ends in, at these places of the rows before they were arranged."""
    taken: dict[int, Tensor] = {}
    if arranged.rows is not None and arranged.columns is not None:
        rows, columns = arranged.rows[rows, columns], arranged.columns[rows, columns]

    def keep(layer: int, hidden_BLD: Tensor) -> None:
        taken[layer] = hidden_BLD[rows, columns]

    hooks = [
        model.get_submodule(f"layers.{layer - 1}").register_forward_hook(
            lambda _block, _inputs, output, layer=layer: keep(
                layer, output if isinstance(output, Tensor) else output[0]
            )
        )
        for layer in set(layers)
    ]
    try:
        last_BLD: Tensor = model(**arranged.inputs, use_cache=False).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return [taken[layer] for layer in layers], last_BLD[rows, columns]


class _Arranged(NamedTuple):
    """What a model is given for rows, and where each of their tokens is then; without `rows`, where it was."""

    inputs: dict[str, Any]
    rows: Tensor | None = None
    columns: Tensor | None = None


def _arranged(model: "PreTrainedModel", input_ids: Tensor, positions: Tensor, segments: Tensor) -> _Arranged:
    if family_of(model.config).alone:
        apart = as_sequences(input_ids, positions, segments)
        return _Arranged({"input_ids": apart.input_ids}, apart.rows, apart.columns)
    if (moved := aligned(input_ids, positions, segments)) is not None:
        return _Arranged(_of_one_sequence(model, moved.input_ids), moved.rows, moved.columns)
    if flex_works(model, input_ids.device):
        takes_every_mask_(model)
        make: Callable[[int | None], Any] = functools.partial(block_mask, positions, segments)
    elif segments.shape[1] <= DENSE_TOKENS:
        make = functools.partial(whole_mask, positions, segments, dtype=next(model.parameters()).dtype)
    else:
        apart = in_shorter_rows(input_ids, positions, segments)
        inner = _arranged(model, apart.input_ids, apart.positions, apart.segments)
        if inner.rows is None or inner.columns is None:
            return _Arranged(inner.inputs, apart.rows, apart.columns)
        return _Arranged(inner.inputs, *(x[apart.rows, apart.columns] for x in (inner.rows, inner.columns)))
    return _Arranged(
        {"input_ids": input_ids, "attention_mask": _by_kind(model.config, make), "position_ids": positions}
    )


def _of_one_sequence(model: "PreTrainedModel", input_ids: Tensor) -> dict[str, Any]:
    """The inputs for rows of one sequence each, padded on the right: no token that is wanted can see the padding, so causal attention will do."""
    config, length = model.config, input_ids.shape[1]
    if length <= DENSE_TOKENS or family_of(config).alone or not makes_mask(config, length, _window(config)):
        return {"input_ids": input_ids}
    takes_every_mask_(model)
    make: Callable[[int | None], Any] = functools.partial(part_mask, device=input_ids.device)
    if flex_works(model, input_ids.device):
        order = torch.arange(length, device=input_ids.device)[None]
        make = functools.partial(block_mask, order, torch.zeros_like(order))
    return {"input_ids": input_ids, "attention_mask": _by_kind(config, make)}


def _window(config: "PretrainedConfig") -> int | None:
    """How many tokens the blocks with a window see; None without such blocks."""
    window: int | None = getattr(config, "sliding_window", None)
    if family_of(config).mask_per_layer_kind and "sliding_attention" not in config.layer_types:
        return None
    return window


def _by_kind(config: "PretrainedConfig", make: Callable[[int | None], Any]) -> Any:
    """The mask for each kind of layer, or the one for all, made for its window."""
    window = _window(config)
    if not family_of(config).mask_per_layer_kind:
        return make(window or None)
    full = make(None)
    return {"full_attention": full, "sliding_attention": full if window is None else make(window)}
