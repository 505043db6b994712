"""Which folder each stage owns, and the settings that decide what it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarm.config import Contexts, Data, Evaluation, Extraction, Model, Pages, Pipeline, Reward, Sae, identity
from sarm.folder_schemas import ACTIVATIONS, CONTEXTS, CORPUS, EVALUATION, PAGES, PAIRS, SAE, SARM
from sarm.manifest import refuse_other_config

_OF_TEXTS = ("texts", "text_field", "max_texts")
_EXTRACTION_OF_TEXTS = ("sentence_ends", "limit_rows", "limit_tokens")

# Where the baselines of reward training go, and what a report calls them.
BASELINES = {
    "scalar_head": "scalar head, same backbone",
    "scalar_head_full": "scalar head, whole backbone",
    "sarm_random_encoder": "SARM, random encoder",
    "sarm_random_directions": "SARM, random directions alone",
    "sarm_random_linear": "SARM, random linear map",
    "sarm_token_sae": "SARM, token-level SAE",
}

Settings = dict[str, Any]


@dataclass(frozen=True)
class Folders:
    """Where each stage of a run writes."""

    out: Path

    corpus = property(lambda self: self.out / "corpus")
    pairs = property(lambda self: self.out / "pairs")
    text_activations = property(lambda self: self.out / "activations" / "text")
    chat_activations = property(lambda self: self.out / "activations" / "chat")
    heldout_activations = property(lambda self: self.out / "activations" / "heldout")
    sae = property(lambda self: self.out / "sae")
    sarm = property(lambda self: self.out / "sarm")
    scalar_head = property(lambda self: self.out / "scalar_head")
    evaluation = property(lambda self: self.out / "evaluation")
    contexts = property(lambda self: self.out / "contexts")
    explanations = property(lambda self: self.out / "explanations")
    pages = property(lambda self: self.out / "features")

    def states(self, name: str) -> Path:
        """Where the training of the folder of this name keeps its states."""
        return self.out / "training" / name

    def activations(self, name: str, layer: int, first_layer: int) -> Path:
        """Where the activations `name` of one of a pass's layers go; those of the first have no folder of their own."""
        return self.out / "activations" / ("" if layer == first_layer else f"layer{layer}") / name


def corpus_settings(data: Data) -> Settings:
    """What decides corpus/v1."""
    return {key: value for key, value in identity(data).items() if key in _OF_TEXTS}


def pairs_settings(data: Data) -> Settings:
    """What decides pairs/v1; `prompts` says what makes two prompts one, which splits and ids go by."""
    return {key: value for key, value in identity(data).items() if key not in _OF_TEXTS} | {"prompts": "normalised"}


def activation_folders(folders: Folders, model: Model, extraction: Extraction) -> dict[tuple[str, str, int], Path]:
    """Where (split, unit, layer) goes; the split of texts is `all`, the unit of pairs `chat`."""
    names: list[tuple[str, str, str]] = [
        ("all", unit, "text" if place == 0 else f"text-{unit}") for place, unit in enumerate(extraction.units)
    ]
    names += [("train", "chat", "chat"), ("heldout", "chat", "heldout")]
    layers = dict.fromkeys((model.layer, *extraction.layers))
    return {(split, unit, n): folders.activations(name, n, model.layer) for split, unit, name in names for n in layers}


def activation_settings(model: Model, extraction: Extraction, split: str, unit: str, layer: int) -> Settings:
    """What decides activations/v1 of one split (`all` for texts), unit and layer."""
    stored = identity(extraction)
    if split != "all":
        stored = {key: value for key, value in stored.items() if key not in _EXTRACTION_OF_TEXTS}
    stored.pop("units", None)
    backbone = {**identity(model), "layer": layer}
    return {**backbone, **stored, "dtype": extraction.dtype, "compute_dtype": model.dtype, "unit": unit, "split": split}


def sae_settings(sae: Sae, seed: int, init_seed: int | None = None) -> Settings:
    """What decides the SAE: `seed` the order of rows, and the first weights too if `init_seed` does not."""
    settings = identity(sae, seed=seed)
    return settings if init_seed in (None, seed) else {**settings, "init_seed": init_seed}


def reward_settings(model: Model, reward: Reward, seed: int) -> Settings:
    """What decides a reward model."""
    return {**identity(model), **identity(reward, seed=seed)}


def evaluation_settings(evaluation: Evaluation, seed: int) -> Settings:
    """What decides the evaluation."""
    return identity(evaluation, seed=seed)


def contexts_settings(contexts: Contexts) -> Settings:
    """What decides contexts/v1."""
    return identity(contexts)


def pages_settings(pages: Pages) -> Settings:
    """What decides the feature pages."""
    return identity(pages)


def refuse_other_run(config: Pipeline) -> None:
    """Raise UserError if any stage folder was made with other settings, before the first stage is paid for."""
    folders, seed = Folders(config.run.out), config.run.seed
    activations = activation_folders(folders, config.model, config.extraction)
    plans = {
        folders.corpus: (CORPUS, corpus_settings(config.data)),
        folders.pairs: (PAIRS, pairs_settings(config.data)),
        **{
            folder: (ACTIVATIONS, activation_settings(config.model, config.extraction, *key))
            for key, folder in activations.items()
        },
        folders.sae: (SAE, sae_settings(config.sae, seed)),
        folders.sarm: (SARM, reward_settings(config.model, config.reward, seed)),
        folders.scalar_head: (SARM, reward_settings(config.model, config.reward, seed)),
        folders.evaluation: (EVALUATION, evaluation_settings(config.evaluation, seed)),
        folders.contexts: (CONTEXTS, contexts_settings(config.contexts)),
        folders.pages: (PAGES, pages_settings(config.pages)),
    }
    if not config.pages.in_pipeline:
        plans = {folder: plan for folder, plan in plans.items() if folder not in (folders.contexts, folders.pages)}
    for folder, (schema, settings) in plans.items():
        refuse_other_config(folder, schema, settings)


def with_figures(counts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Counts, with those that a reader looks for first under `figures`."""
    figures = {name: counts[name] for name in names if name in counts}
    return {**counts, "figures": {**figures, "rejected": sum(counts.get("rejected", {}).values())}}
