"""Language models from their files: the config cut at a layer, the first blocks with their weights, and the whole model.

Apart from `backbone`, since an exported model brings its own weights. `transformers` is imported by what reads a config or loads weights: its
models alone take a second.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .backbone import FAMILIES, REFUSED, attention_of, without_final_norm
from .layer_embeddings import fill_layer_embeddings_
from .loading_report import faults

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Beginnings of a language model's weights in a checkpoint that holds more than it: a vision tower, a projector.
_TEXT_PART = {r"^(?:model\.)?language_model\.(?:model\.)?": ""}
# Beginnings that reward models have before them: TRL's value heads, DeepSpeed-Chat, Starling, GRM.
_WRAPPED = {r"^(?:(?:pretrained_model|rwtransformer|transformer)\.(?:model\.)?|model\.model\.)": ""}
_BLOCK = re.compile(r"^(?:(?:model|language_model|transformer|rwtransformer|pretrained_model)\.)*layers\.(\d+)\.")
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|attn\.(?:masked_)?bias$")
# Published weights of these kinds are read as the numbers that they stand for.
_DEQUANTISED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
# Their angles follow from the longest row of a batch, once one is longer than this field of the config says.
_BY_LONGEST = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}


def read_config(name: str, layer: int, *, revision: str = "main", gguf_file: str = "") -> "PretrainedConfig":
    """The config of the model, or of its language model where it has more parts, with `layer` blocks.

    Raises ValueError if there is no such model, its family is unknown or cannot be right, or it has fewer blocks.
    """
    config = _whole_config(name, revision, gguf_file)
    if layer > config.num_hidden_layers:
        raise ValueError(
            f"layer {layer} is beyond {name}, which has {config.num_hidden_layers} blocks. Pass --model.layer."
        )
    _cut_(config, layer, name)
    config._attn_implementation = attention_of(config)
    config.use_cache = False
    return config


def read_depth(name: str, *, revision: str = "main", gguf_file: str = "") -> int:
    """How many blocks the whole model has; raises ValueError as `read_config` does."""
    layers: int = _whole_config(name, revision, gguf_file).num_hidden_layers
    return layers


def is_unneeded(key: str, layer: int) -> bool:
    """Whether a weight in a model's files is none of its first `layer` blocks': of later ones, of heads, of vision towers, or derived from the config."""
    block = _BLOCK.search(key)
    return block is None or int(block[1]) >= layer or is_derived(key)


def is_derived(key: str) -> bool:
    """Whether older versions of the library wrote this buffer beside the weights; it follows from the config."""
    return _DERIVED.search(key) is not None


def longest_row(config: "PretrainedConfig") -> int | None:
    """The number of tokens up to which a row's angles do not depend on the rows beside it; None where they never do."""
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    limits = []
    for one in each:
        if field := _BY_LONGEST.get(str(one.get("rope_type") or one.get("type"))):
            limits.append(int(one.get(field) or getattr(config, field, 0) or config.max_position_embeddings))
    return min(limits, default=None)


def load_backbone(
    name: str, layer: int, dtype: torch.dtype = torch.float32, *, revision: str = "main", gguf_file: str = ""
) -> "PreTrainedModel":
    """The truncated backbone with its weights; blocks after `layer` and the LM head are never read.

    Raises ValueError as `read_config` does, and unless every weight of these blocks comes from the files.
    """
    from transformers import AutoModel

    config = read_config(name, layer, revision=revision, gguf_file=gguf_file)
    norm = FAMILIES[config.model_type].final_norm

    with _loading(name):
        model, report = AutoModel.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            attn_implementation=config._attn_implementation,
            key_mapping=_TEXT_PART | _WRAPPED,
            **_strictly(config, revision, gguf_file),
        )
        fill_layer_embeddings_(model, report, name, revision)
    if wrong := faults(
        report, may_lack=lambda key: key.startswith(f"{norm}."), may_hold=lambda key: is_unneeded(key, layer)
    ):
        raise ValueError(f"{name}, of whose first {layer} blocks every weight is needed, {wrong}. The download may be incomplete, or the config another model's.")  # fmt: skip
    return without_final_norm(model)


def load_language_model(
    name: str, layer: int, dtype: torch.dtype = torch.float32, *, revision: str = "main", gguf_file: str = ""
) -> "PreTrainedModel":
    """The whole model with its LM head, to see what changes in its predictions when block `layer` is tampered with.

    Raises ValueError as `read_config` does, and unless every weight comes from the files.
    """
    from transformers import AutoModelForCausalLM

    read_config(name, layer, revision=revision, gguf_file=gguf_file)
    config = _whole_config(name, revision, gguf_file)
    # Where the language model is a part, its weights are renamed to those of a model that is nothing else.
    mapping = dict.fromkeys(_TEXT_PART, "model.")
    with _loading(name):
        found: Any = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, key_mapping=mapping, **_strictly(config, revision, gguf_file)
        )
    model, report = found
    if wrong := faults(report, may_hold=lambda key: _BLOCK.search(key) is None or is_derived(key)):
        raise ValueError(f"{name} {wrong}. The download may be incomplete, or the config another model's.")
    loaded: PreTrainedModel = model
    return loaded


def _whole_config(name: str, revision: str, gguf_file: str) -> "PretrainedConfig":
    from transformers import AutoConfig

    path = Path(name).expanduser()
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise ValueError(f"no model folder {name}. Pass --model.name with a folder or a Hugging Face id.")
    with quiet_transformers():
        try:
            whole: PretrainedConfig = AutoConfig.from_pretrained(name, **_source(revision, gguf_file))
        # A config is checked by its own class, which raises what it likes.
        except Exception as error:
            _refuse(name, _kind_in(name, revision))
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"cannot read the model {name}: {reason} Pass --model.name with a folder or a Hugging Face id."
            ) from error
    part: PretrainedConfig | None = getattr(whole, "text_config", None)
    config = whole if whole.model_type in FAMILIES or part is None else part
    _refuse(name, config.model_type)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{name} is a {config.model_type} model, supported are {', '.join(FAMILIES)}. Pass --model.name."
        )
    if config is not whole and getattr(whole, "quantization_config", None):
        config.quantization_config = whole.quantization_config
    _check_quantisation(config, name, gguf_file)
    return config


def _refuse(name: str, kind: str) -> None:
    if kind in REFUSED:
        raise ValueError(f"{name} is a {kind} model, {REFUSED[kind]}. Pass --model.name.")


def _kind_in(name: str, revision: str) -> str:
    """What a config says that it is, without its class; empty where there is none."""
    from transformers import PretrainedConfig

    try:
        return str(PretrainedConfig.get_config_dict(name, revision=revision)[0].get("model_type"))
    except (OSError, ValueError):
        return ""


def _check_quantisation(config: "PretrainedConfig", name: str, gguf_file: str) -> None:
    method = _quantised_by(config)
    if method and method not in _DEQUANTISED and not gguf_file:
        raise ValueError(
            f"the weights of {name} are quantised by {method}, and only {' and '.join(_DEQUANTISED)} are read. Pass the weights that they were made from to --model.name."
        )


def _quantised_by(config: "PretrainedConfig") -> str:
    found = getattr(config, "quantization_config", None) or {}
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method) or "")


def _cut_(config: "PretrainedConfig", layer: int, name: str) -> None:
    depth = config.num_hidden_layers
    if getattr(config, "use_bidirectional_attention", None) is True:
        raise ValueError(f"{name} attends to both sides, so that a token's activation is of the whole row. Pass a causal --model.name.")  # fmt: skip
    if shared := getattr(config, "num_kv_shared_layers", None):
        # The last ones of the whole model take the keys of earlier ones.
        config.num_kv_shared_layers = max(0, layer - (depth - shared))
        if config.num_kv_shared_layers and getattr(config, "hidden_size_per_layer_input", None) == 0:
            raise ValueError(f"{name} takes the keys of earlier layers at layer {layer} without an embedding for each of its layers, which transformers cannot compute. Pass --model.layer {depth - shared} or lower.")  # fmt: skip
    each = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == depth and ("layer" in key or "types" in key)
    }
    config.num_hidden_layers = layer
    for key, value in each.items():
        setattr(config, key, value[:layer])


def _strictly(config: "PretrainedConfig", revision: str, gguf_file: str) -> dict[str, Any]:
    """Arguments of a loading that reports everything and takes no pickles."""
    given = {**_source(revision, gguf_file), "output_loading_info": True, "ignore_mismatched_sizes": True}
    if gguf_file:
        return given
    if kind := _DEQUANTISED.get(_quantised_by(config)):
        import transformers

        given["quantization_config"] = getattr(transformers, kind)(dequantize=True)
    return {**given, "use_safetensors": True}


def _source(revision: str, gguf_file: str) -> dict[str, Any]:
    return {"revision": revision, "trust_remote_code": False, **({"gguf_file": gguf_file} if gguf_file else {})}


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """What the library raises about files becomes a ValueError of one line."""
    with quiet_transformers():
        try:
            yield
        # Configs and weights are read by dozens of classes, which raise what they like.
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"cannot load the weights of {name}: {reason} Pass another --model.name.") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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
