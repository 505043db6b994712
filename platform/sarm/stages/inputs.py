"""What can be found wrong with sources, model and layer before anything is paid for, without loading the model."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from sarm.data.formats.model_shapes import KNOWN_MODELS, shape_of
from sarm.data.sources.built_in import BUILT_IN_PAIRS, BUILT_IN_TEXTS, RESPONSE_SOURCES
from sarm.settings.checks import UserError
from sarm.settings.data import DataSettings
from sarm.settings.model import ModelSettings
from sarm.stages.chain_state import ChainState


def check_inputs(config: Any, state: ChainState) -> None:
    """Raise UserError for what a stage that is to do would find out after an earlier one was paid for."""
    if state.is_todo("prepare_data"):
        check_sources(config.data)
    if state.is_todo("extract_activations"):
        check_layers(config.model, {config.model.layer})
        check_layers(config.model, {config.model.layer, *config.extraction.layers}, "--layers")
    elif state.is_todo("train_sarm"):
        check_layers(config.model, {config.model.layer})


def check_sources(data: DataSettings) -> None:
    """Raise UserError unless every source can be opened; built-in ones need no look, and no seconds of imports."""
    texts = [spec for spec in data.texts if spec not in BUILT_IN_TEXTS]
    pairs = [spec for spec in data.pairs if spec not in BUILT_IN_PAIRS]
    responses = [spec for spec in data.responses if spec not in RESPONSE_SOURCES]
    if texts or pairs or responses:
        from sarm.data.sources import pairs as pair_sources
        from sarm.data.sources import texts as text_sources

        for spec in texts:
            text_sources.check_source(spec, data.text_field)
        for spec in responses:
            text_sources.check_source(spec, "messages")
        for spec in pairs:
            pair_sources.check_source(spec, data.column_names)
    if not data.pairs:
        raise UserError(
            "there are no preference pairs. Pass --data.pairs with files, hf:NAME, or a preset that names them."
        )


def check_layers(model: ModelSettings, layers: Collection[int], flag: str = "--model.layer") -> None:
    """Raise UserError for a model that cannot be used, and for a layer beyond its blocks, as far as its files are here.

    A model of the Hugging Face hub that is not in the cache is not asked for: a dry run needs no network.
    """
    if model.name not in KNOWN_MODELS and _is_local(model.name):
        # Seconds of imports; who brings a model wants to know whether it will do.
        from sarm.data.formats.models import check_model

        check_model(model)
    shape = shape_of(model)
    deepest = max(layers)
    if shape is not None and deepest > shape.num_blocks:
        raise UserError(f"layer {deepest} is beyond {model.name}, which has {shape.num_blocks} blocks. Pass {flag}.")


def _is_local(name: str) -> bool:
    return ":" in name or Path(name).expanduser().exists() or name.startswith((".", "~", "/")) or name.count("/") > 1
