"""Which folder each stage owns, and the settings that decide what it holds.

Loads nothing heavy: dry runs and refusals come from here.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.folders import (
    ACTIVATIONS_FOLDER,
    CONTEXTS_FOLDER,
    CORPUS_FOLDER,
    EVALUATION_FOLDER,
    PAGES_FOLDER,
    PAIRS_FOLDER,
    SAE_FOLDER,
    SARM_FOLDER,
    Folders,
)
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.contexts import ContextsSettings, PagesSettings
from sarm.settings.data import DataSettings
from sarm.settings.evaluation import EvaluationSettings
from sarm.settings.extraction import ExtractionSettings
from sarm.settings.identity import identity
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.run import StageName
from sarm.settings.sae import AlsoSaes, SaeSettings
from sarm.stages.variants import variants

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


def corpus_settings(data: DataSettings) -> Settings:
    """What decides corpus/v1."""
    return {key: value for key, value in identity(data).items() if key in _OF_TEXTS}


def pairs_settings(data: DataSettings) -> Settings:
    """What decides pairs/v1; `prompts` says what makes two prompts one, which splits and ids go by."""
    return {key: value for key, value in identity(data).items() if key not in _OF_TEXTS} | {"prompts": "normalised"}


def activation_folders(
    folders: Folders, model: ModelSettings, extraction: ExtractionSettings
) -> dict[tuple[str, str, int], Path]:
    """Where (split, unit, layer) goes; the split of texts is `all`, the unit of pairs `chat`."""
    names: list[tuple[str, str, str]] = [
        ("all", unit, "text" if place == 0 else f"text-{unit}") for place, unit in enumerate(extraction.units)
    ]
    names += [("train", "chat", "chat"), ("heldout", "chat", "heldout")]
    layers = dict.fromkeys((model.layer, *extraction.layers))
    return {(split, unit, n): folders.activations(name, n, model.layer) for split, unit, name in names for n in layers}


def activation_settings(
    model: ModelSettings, extraction: ExtractionSettings, split: str, unit: str, layer: int
) -> Settings:
    """What decides activations/v1 of one split (`all` for texts), unit and layer."""
    stored = identity(extraction)
    if split != "all":
        stored = {key: value for key, value in stored.items() if key not in _EXTRACTION_OF_TEXTS}
    stored.pop("units", None)
    backbone = {**identity(model), "layer": layer}
    about = {"dtype": extraction.dtype, "compute_dtype": model.dtype, "unit": unit, "split": split}
    return {**backbone, **stored, **about, **_of_conversations()}


def sae_settings(sae: SaeSettings, seed: int, init_seed: int | None = None) -> Settings:
    """What decides the SAE: `seed` the order of rows, and the first weights too if `init_seed` does not."""
    settings = identity(sae, seed=seed)
    return settings if init_seed in (None, seed) else {**settings, "init_seed": init_seed}


def reward_settings(model: ModelSettings, reward: RewardSettings, seed: int) -> Settings:
    """What decides a reward model."""
    return {**identity(model), **identity(reward, seed=seed), **_of_conversations()}


def evaluation_settings(evaluation: EvaluationSettings, seed: int) -> Settings:
    """What decides the evaluation."""
    return {**identity(evaluation, seed=seed), **_of_conversations()}


def contexts_settings(contexts: ContextsSettings) -> Settings:
    """What decides contexts/v1."""
    return {**identity(contexts), **_of_conversations()}


def _of_conversations() -> Settings:
    """What decides which text and which token every stage reads: folders of other rules are not mixed with those of today."""
    return {"protocol_version": PROTOCOL_VERSION}


def pages_settings(pages: PagesSettings) -> Settings:
    """What decides the feature pages."""
    return identity(pages)


class FolderPlan(NamedTuple):
    """A folder that a stage writes. `settings` is what decides it, None where that takes a look at the model."""

    folder: Path
    schema: str
    settings: Settings | None
    inputs: frozenset[str] | None = None
    """Names of the folders that it is made from, where the settings alone do not say; None: those."""


def stage_folders(stage: StageName, config: Any, folders: Folders) -> list[FolderPlan]:
    """The folders that a stage of this config writes; `config` is that of a job that knows the stage's settings."""
    return _PLANS[stage](config, folders)


def _prepared(config: Any, folders: Folders) -> list[FolderPlan]:
    corpus = [FolderPlan(folders.corpus, CORPUS_FOLDER, corpus_settings(config.data))] if config.data.texts else []
    return [*corpus, FolderPlan(folders.pairs, PAIRS_FOLDER, pairs_settings(config.data))]


def _extracted(config: Any, folders: Folders) -> list[FolderPlan]:
    return [
        FolderPlan(path, ACTIVATIONS_FOLDER, activation_settings(config.model, config.extraction, *key))
        for key, path in activation_folders(folders, config.model, config.extraction).items()
        if key[0] != "all" or config.data.texts
    ]


def sae_folders(
    folders: Folders, sae: SaeSettings, also: AlsoSaes, seed: int
) -> list[tuple[str, Path, SaeSettings, int]]:
    """(stage, folder, settings, seed of the first weights) of the SAE, and of those that learn beside it."""
    beside = also.beside(sae, seed)
    others = [(f"train SAE {name}", folders.out / "saes" / name, other, number) for name, other, number in beside]
    return [("train SAE", folders.sae, sae, seed), *others]


def _saes(config: Any, folders: Folders) -> list[FolderPlan]:
    also, seed = getattr(config, "also", AlsoSaes()), config.run.seed
    planned = sae_folders(folders, config.sae, also, seed)
    return [FolderPlan(path, SAE_FOLDER, sae_settings(sae, seed, number)) for _, path, sae, number in planned]


def _reward_models(config: Any, folders: Folders) -> list[FolderPlan]:
    planned = variants(config.model, config.reward, folders.sae, depth_of=lambda model: model.layer)
    return [
        FolderPlan(
            folders.out / one.folder,
            SARM_FOLDER,
            None if one.folder == "scalar_head_full" else reward_settings(one.model, one.reward, config.run.seed),
        )
        for one in planned
    ]


def _evaluation(config: Any, folders: Folders) -> list[FolderPlan]:
    asked = {plan.folder.name for plan in _reward_models(config, folders)}
    inputs = {SARM_FOLDER, SAE_FOLDER, PAIRS_FOLDER, "activations/chat", "activations/heldout"}
    inputs |= {name for name in BASELINES if name in asked or (folders.out / name).exists()}
    settings = evaluation_settings(config.evaluation, config.run.seed)
    return [FolderPlan(folders.evaluation, EVALUATION_FOLDER, settings, frozenset(inputs))]


_PLANS: dict[str, Callable[[Any, Folders], list[FolderPlan]]] = {
    "prepare_data": _prepared,
    "extract_activations": _extracted,
    "train_sae": _saes,
    "train_sarm": _reward_models,
    "evaluate": _evaluation,
    "collect_contexts": lambda config, folders: [
        FolderPlan(folders.contexts, CONTEXTS_FOLDER, contexts_settings(config.contexts))
    ],
    "feature_pages": lambda config, folders: [FolderPlan(folders.pages, PAGES_FOLDER, pages_settings(config.pages))],
}


def with_figures(counts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Counts, with those that a reader looks for first under `figures`."""
    figures = {name: counts[name] for name in names if name in counts}
    return {**counts, "figures": {**figures, "rejected": sum(counts.get("rejected", {}).values())}}
