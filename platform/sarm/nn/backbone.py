"""The first `layer` blocks of a causal language model: token ids in, raw residual stream after block `layer` out.

B rows, L columns. Several answers to one prompt may share a row: segment 0 is the shared prompt, segments 1, 2, ... the
answers, -1 padding. A token sees its own segment and segment 0 up to itself, and positions restart at each answer, so
every answer is computed as if it stood alone after the prompt. Several prompts may share a row too: the b-th has its
segments in the block from b * SEGMENTS_PER_BLOCK on, which begins with its shared prompt.

A branch is a leaf behind a token of an answer (or of the shared prompt): it sees what that token sees, and nobody sees it. The m-th branch
of segment s is segment s + m * ANSWERS_PER_BLOCK, and its positions go on from that token's. So a row holds the ends of turn behind many
beginnings of an answer, each as if the answer stopped there.

A family whose blocks keep a state along a row, as recurrent ones do, knows no segments: its rows are taken apart, and every answer is read
behind its prompt as a sequence of its own (`_taken_apart`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

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
# More answers to one prompt, or more branches of one of them, do not fit a row.
ANSWERS_PER_BLOCK = 1 << 16
SEGMENTS_PER_BLOCK = ANSWERS_PER_BLOCK << 16


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
    if family_of(model.config).alone:
        apart = _taken_apart(input_ids, positions, segments)
        hidden: Tensor = model(input_ids=apart.input_ids, use_cache=False).last_hidden_state
        return hidden[apart.sequences, apart.columns]
    masks = _masks(model.config, positions, segments, next(model.parameters()).dtype)
    residual_BLD: Tensor = model(
        input_ids=input_ids, attention_mask=masks, position_ids=positions, use_cache=False
    ).last_hidden_state
    return residual_BLD


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
    taken: dict[int, Tensor] = {}
    if segments is not None and family_of(model.config).alone:
        assert positions is not None
        apart = _taken_apart(input_ids, positions, segments)
        rows, columns = apart.sequences[rows, columns], apart.columns[rows, columns]
        input_ids, segments = apart.input_ids, None

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
        if segments is None:
            model(input_ids=input_ids, use_cache=False)
        else:
            assert positions is not None
            residual_stream(model, input_ids, positions, segments)
    finally:
        for hook in hooks:
            hook.remove()
    return [taken[layer] for layer in layers]


class _Apart(NamedTuple):
    """Rows as sequences, one for each answer with its prompt before it; padded on the right, which no causal model sees."""

    input_ids: Int[Tensor, "sequences tokens"]
    sequences: Int[Tensor, "rows columns"]
    columns: Int[Tensor, "rows columns"]
    """Where the token of each place is; padding is anywhere."""


def _taken_apart(
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"],
    segments: Int[Tensor, "rows columns"],
) -> _Apart:
    """Every token with all that it sees, and as few sequences as hold all tokens: those of each answer's and branch's last token."""
    visible_BLL = _visible(positions, segments, None).cpu()
    is_token_BL = segments.cpu() >= 0
    sequences = torch.zeros(segments.shape, dtype=torch.long)
    columns = torch.zeros_like(sequences)
    found: list[Tensor] = []
    for row, open_L in enumerate(is_token_BL.clone()):
        for last in reversed(range(len(open_L))):
            if not open_L[last]:
                continue
            seen = (visible_BLL[row, last] & is_token_BL[row]).nonzero().flatten()
            is_new = open_L[seen]
            sequences[row, seen[is_new]] = len(found)
            columns[row, seen[is_new]] = is_new.nonzero().flatten()
            open_L[seen] = False
            found.append(input_ids[row, seen.to(input_ids.device)])
    padded = nn.utils.rnn.pad_sequence(found, batch_first=True) if found else input_ids[:, :1]
    return _Apart(padded, sequences.to(input_ids.device), columns.to(input_ids.device))


def _masks(config: "PretrainedConfig", positions: Tensor, segments: Tensor, dtype: torch.dtype) -> Any:
    full = _additive(_visible(positions, segments, None), dtype)
    window = getattr(config, "sliding_window", None)
    if family_of(config).mask_per_layer_kind:
        kinds = set(config.layer_types)
        sliding = _additive(_visible(positions, segments, window), dtype) if "sliding_attention" in kinds else full
        return {"full_attention": full, "sliding_attention": sliding}
    return _additive(_visible(positions, segments, window), dtype) if window else full


def _visible(positions: Tensor, segments: Tensor, window: int | None) -> Tensor:
    """[B, L, L] of whether row i may look at column j."""
    length = segments.shape[1]
    order = torch.arange(length, device=segments.device)
    segments = segments.long()
    in_block = segments % SEGMENTS_PER_BLOCK
    shared_prompt, answer = segments - in_block, segments - in_block + in_block % ANSWERS_PER_BLOCK
    own, of_answer, of_prompt = (x[:, :, None] == segments[:, None, :] for x in (segments, answer, shared_prompt))
    # No answer's number and no prompt's is that of a branch: nobody but itself sees one.
    visible = (order[:, None] >= order[None, :]) & (own | of_answer | of_prompt)
    if window is not None:
        visible = visible & (positions[:, :, None] - positions[:, None, :] < window)
    return visible


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
