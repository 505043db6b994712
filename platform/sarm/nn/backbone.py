"""The first `layer` blocks of a causal language model: token ids in, raw residual stream after block `layer` out.

B rows, L columns. Several answers to one prompt may share a row: segment 0 is the shared prompt, segments 1, 2, ... the
answers, -1 padding. A token sees its own segment and segment 0 up to itself, and positions restart at each answer, so
every answer is computed as if it stood alone after the prompt. Several prompts may share a row too: the b-th has its
segments in the block from b * SEGMENTS_PER_BLOCK on, which begins with its shared prompt.

A branch is a leaf behind a token of an answer (or of the shared prompt): it sees what that token sees, and nobody sees it. The m-th branch
of segment s is segment s + m * ANSWERS_PER_BLOCK, and its positions go on from that token's. So a row holds the ends of turn behind many
beginnings of an answer, each as if the answer stopped there.

`transformers` is imported by what reads a config or loads weights: its models alone take a second.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
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


# By `model_type`: those whose block forward was checked against `hidden_states[layer]`; gemma3 with vision keeps its text part elsewhere.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(mask_per_layer_kind=True),
    "qwen3": Family(mask_per_layer_kind=True),
    "gemma": Family(),
    "gemma2": Family(mask_per_layer_kind=True),
    "gemma3_text": Family(mask_per_layer_kind=True),
}
# More answers to one prompt, or more branches of one of them, do not fit a row.
ANSWERS_PER_BLOCK = 1 << 16
SEGMENTS_PER_BLOCK = ANSWERS_PER_BLOCK << 16


def read_config(name: str, layer: int, *, revision: str = "main", gguf_file: str = "") -> "PretrainedConfig":
    """The model's config with `layer` blocks.

    Raises ValueError if there is no such model, its family is unknown, or it has fewer blocks.
    """
    from transformers import AutoConfig

    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ValueError(f"no model folder {name}. Pass --model.name with a folder or a Hugging Face id.")
    with _quiet_transformers():
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(name, **_source(revision, gguf_file))
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"cannot read the model {name}: {reason} Pass --model.name with a folder or a Hugging Face id."
            ) from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} is a {config.model_type} model, supported are {', '.join(FAMILIES)}. Pass --model.name."
        )
    if layer > config.num_hidden_layers:
        raise ValueError(
            f"layer {layer} is beyond {name}, which has {config.num_hidden_layers} blocks. Pass --model.layer."
        )
    config.num_hidden_layers = layer
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layer]
    # The SDPA kernels leave out Gemma 2's soft cap on attention scores.
    config._attn_implementation = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    config.use_cache = False
    return config


def read_depth(name: str, *, revision: str = "main", gguf_file: str = "") -> int:
    """How many blocks the whole model has; raises ValueError as `read_config` does."""
    from transformers import AutoConfig

    read_config(name, 1, revision=revision, gguf_file=gguf_file)
    layers: int = AutoConfig.from_pretrained(name, **_source(revision, gguf_file)).num_hidden_layers
    return layers


def load_backbone(
    name: str, layer: int, dtype: torch.dtype = torch.float32, *, revision: str = "main", gguf_file: str = ""
) -> "PreTrainedModel":
    """The truncated backbone with its weights; blocks after `layer` and the LM head are never read.

    Raises ValueError as `read_config` does, and if a weight is missing from the files.
    """
    from transformers import AutoModel

    config = read_config(name, layer, revision=revision, gguf_file=gguf_file)
    attention = config._attn_implementation
    with _quiet_transformers():
        model, report = AutoModel.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
            **_source(revision, gguf_file),
            **({} if gguf_file else {"use_safetensors": True}),
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("norm."))
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of the first {layer} blocks, e.g. {missing[0]}. The download may be incomplete."
        )
    return without_final_norm(model)


def load_language_model(
    name: str, layer: int, dtype: torch.dtype = torch.float32, *, revision: str = "main", gguf_file: str = ""
) -> "PreTrainedModel":
    """The whole model with its LM head, to see what changes in its predictions when block `layer` is tampered with.

    Raises ValueError as `read_config` does.
    """
    from transformers import AutoModelForCausalLM

    read_config(name, layer, revision=revision, gguf_file=gguf_file)
    safe = {} if gguf_file else {"use_safetensors": True}
    with _quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **_source(revision, gguf_file), **safe)


def without_final_norm(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same model ending in its raw residual stream (SARM section 3: the SAE reads it, and normalises by itself)."""
    model.norm = nn.Identity()
    if hasattr(model.config, "quantization_config"):
        # Weights were dequantised on loading; `save_pretrained` refuses to write a GGUF config back.
        del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
    return model


def residual_stream(
    model: "PreTrainedModel",
    input_ids: Int[Tensor, "rows columns"],
    positions: Int[Tensor, "rows columns"],
    segments: Int[Tensor, "rows columns"],
) -> Float[Tensor, "rows columns d_in"]:
    """Residual stream after the last kept block at every token."""
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


def _masks(config: "PretrainedConfig", positions: Tensor, segments: Tensor, dtype: torch.dtype) -> Any:
    full = _additive(_visible(positions, segments, None), dtype)
    window = getattr(config, "sliding_window", None)
    # An exported model may be of a family that is not listed here: its blocks take one mask, as most do.
    if FAMILIES.get(config.model_type, Family()).mask_per_layer_kind:
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


def _source(revision: str, gguf_file: str) -> dict[str, Any]:
    return {"revision": revision, "trust_remote_code": False, **({"gguf_file": gguf_file} if gguf_file else {})}


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the report that later blocks were left unread, which is the intention."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
