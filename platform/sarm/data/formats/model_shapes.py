"""The dimensions of a language model that decide its cost, without loading it; and the models that are known by name, one entry each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sarm.settings.model import ModelSettings


class Shape(NamedTuple):
    """Width of the residual stream, of the feed-forward part, of all queries and of all keys; blocks of the whole model; vocabulary."""

    d_in: int
    d_ff: int
    d_query: int
    d_key: int
    num_blocks: int
    vocabulary: int

    @property
    def weights_a_block(self) -> int:
        """Weights of the matrices of a block: queries, keys, values, output, and the gated feed-forward part."""
        return 2 * self.d_in * (self.d_query + self.d_key) + 3 * self.d_in * self.d_ff

    def backbone(self, depth: int) -> int:
        """Weights of the first `depth` blocks and of the embedding."""
        return depth * self.weights_a_block + self.vocabulary * self.d_in


class KnownModel(NamedTuple):
    """A model whose shape is known by its name, so that a dry run needs no download; `build` makes it where it is built in."""

    shape: Shape
    build: Callable[[], Path] | None = None
    """Makes the model once, and returns its cached folder."""


def _tiny_llama() -> Path:
    from sarm.data.sources.tiny import tiny_model

    return tiny_model()


def _smollm2() -> Path:
    from sarm.data.sources.demo import demo_model

    return demo_model()


KNOWN_MODELS: dict[str, KnownModel] = {
    "demo:smollm2": KnownModel(
        Shape(d_in=576, d_ff=1536, d_query=576, d_key=192, num_blocks=30, vocabulary=49152), _smollm2
    ),
    "tiny:llama": KnownModel(Shape(d_in=64, d_ff=128, d_query=64, d_key=32, num_blocks=2, vocabulary=600), _tiny_llama),
    "meta-llama/Llama-3.2-1B-Instruct": KnownModel(
        Shape(d_in=2048, d_ff=8192, d_query=2048, d_key=512, num_blocks=16, vocabulary=128256)
    ),
    "meta-llama/Llama-3.2-3B-Instruct": KnownModel(
        Shape(d_in=3072, d_ff=8192, d_query=3072, d_key=1024, num_blocks=28, vocabulary=128256)
    ),
    "meta-llama/Llama-3.1-8B-Instruct": KnownModel(
        Shape(d_in=4096, d_ff=14336, d_query=4096, d_key=1024, num_blocks=32, vocabulary=128256)
    ),
}
BUILT_IN_MODELS = {name: known.build for name, known in KNOWN_MODELS.items() if known.build is not None}


def shape_of(model: ModelSettings) -> Shape | None:
    """The shape of a known model, of a local folder, or of a model whose config is in the Hugging Face cache; None for others."""
    if model.name in KNOWN_MODELS:
        return KNOWN_MODELS[model.name].shape
    file = _config_file(model)
    if file is None or model.gguf_file:
        return None
    try:
        about = json.loads(file.read_text())
        return _shape(about.get("text_config") or about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # The model's own check says what is wrong with the file.
        return None


def _config_file(model: ModelSettings) -> Path | None:
    local = Path(model.name).expanduser() / "config.json"
    if local.is_file():
        return local
    if ":" in model.name or model.name.count("/") > 1 or model.name.startswith((".", "~", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model.name, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _shape(about: dict[str, Any]) -> Shape | None:
    if any("experts" in name for name in about):
        # A token passes through some of the experts, and memory holds all of them: not one number.
        return None
    d_in, heads = int(about["hidden_size"]), int(about["num_attention_heads"])
    head = int(about.get("head_dim") or d_in // heads)
    keys = int(about.get("num_key_value_heads") or heads)
    blocks, vocabulary = int(about["num_hidden_layers"]), int(about["vocab_size"])
    return Shape(
        d_in=d_in,
        d_ff=int(about["intermediate_size"]),
        d_query=heads * head,
        d_key=keys * head,
        num_blocks=blocks,
        vocabulary=vocabulary,
    )
