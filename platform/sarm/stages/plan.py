"""Which folders each stage writes: their schema, the settings that decide what they hold, and the folders that they are made from.

Everything that asks for one of these asks here: the stages themselves, refusals before anything is paid for, dry runs.
Loads nothing heavy.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.folders import (
    ACTIVATIONS_FOLDER,
    BASELINES,
    CONTEXTS_FOLDER,
    CORPUS_FOLDER,
    EVALUATION_FOLDER,
    EXPLANATIONS_FOLDER,
    PAGES_FOLDER,
    PAIRS_FOLDER,
    RESPONSES_FOLDER,
    SAE_FOLDER,
    SARM_FOLDER,
    Folders,
)
from sarm.contracts.manifest import StageFolder
from sarm.nn.protocol import PROTOCOL_VERSION
from sarm.settings.contexts import ContextsSettings, PagesSettings
from sarm.settings.data import DataSettings
from sarm.settings.evaluation import EvaluationSettings
from sarm.settings.extraction import TURN_END, ExtractionSettings, Unit
from sarm.settings.identity import identity
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RewardSettings
from sarm.settings.sae import OF_RECIPE, AlsoSaes, SaeSettings
from sarm.stages.variants import Variant

_OF_TEXTS = ("texts", "text_field", "max_texts")
_LIMITS_OF_TEXTS = ("limit_rows", "limit_tokens", "limit_sentences")

# The turn ends of training responses, each response once.
RESPONSES = f"chat-{TURN_END}"
# The same of answers that are in no pair, and what their split is called.
MORE_RESPONSES, UNPAIRED = f"responses-{TURN_END}", "unpaired"

Settings = dict[str, Any]
# (split, unit, layer); the split of texts is `all`, the unit of pairs `chat`, or `turn_end` for what dictionaries learn from.
Key = tuple[str, str, int]


class FolderPlan(NamedTuple):
    """A folder that a stage writes."""

    folder: Path
    schema: str
    settings: Settings | None
    """What decides the folder's content; None where that takes a look at the model."""
    inputs: Mapping[str, tuple[Path, str]] = {}
    """Path and schema of the folders that it is made from, by the names that its manifest gives them."""

    may_lack: frozenset[str] = frozenset()
    """Inputs that come later: a folder that was made before they were there is still good."""

    def open(self) -> StageFolder:
        """The folder to be worked on. Raises UserError unless all its inputs are finished."""
        assert self.settings is not None
        return StageFolder(self.folder, self.schema, self.settings, self.inputs)


def corpus(folders: Folders, data: DataSettings) -> FolderPlan:
    """corpus/v1."""
    settings = {key: value for key, value in identity(data).items() if key in _OF_TEXTS}
    return FolderPlan(folders.corpus, CORPUS_FOLDER, settings)


def pairs(folders: Folders, data: DataSettings) -> FolderPlan:
    """pairs/v1; `prompts` says what makes two prompts one, which splits and ids go by."""
    settings = {key: value for key, value in identity(data).items() if key not in (*_OF_TEXTS, "responses")}
    return FolderPlan(folders.pairs, PAIRS_FOLDER, settings | {"prompts": "normalised"})


def responses(folders: Folders, data: DataSettings) -> FolderPlan:
    """responses/v1: answers in no pair, of prompts that are not held out."""
    about = {key: value for key, value in identity(data).items() if key in ("responses", "heldout_share")}
    return FolderPlan(
        folders.responses, RESPONSES_FOLDER, about | {"prompts": "normalised"}, folders.inputs(PAIRS_FOLDER)
    )


def activations(folders: Folders, model: ModelSettings, extraction: ExtractionSettings) -> dict[Key, FolderPlan]:
    """activations/v1 of every split, unit and layer of an extraction."""
    names = [("all", unit, _text_name(unit, place)) for place, unit in enumerate(extraction.units)]
    names += [("train", "chat", "chat"), ("heldout", "chat", "heldout")]
    # For dictionaries alone, which learn nothing from held-out prompts.
    names += (
        [("train", TURN_END, RESPONSES), (UNPAIRED, TURN_END, MORE_RESPONSES)] if TURN_END in extraction.units else []
    )
    layers = dict.fromkeys((model.layer, *extraction.layers))
    return {
        (split, unit, layer): FolderPlan(
            folders.activations(name, layer, model.layer),
            ACTIVATIONS_FOLDER,
            activation_settings(model=model, extraction=extraction, split=split, unit=unit, layer=layer),
            folders.inputs({"all": CORPUS_FOLDER, UNPAIRED: RESPONSES_FOLDER}.get(split, PAIRS_FOLDER)),
        )
        for split, unit, name in names
        for layer in layers
    }


def _text_name(unit: Unit, place: int) -> str:
    """The folder of a unit of texts, by its place among those that are extracted."""
    return f"text-{unit}" if place else "text"


def activation_settings(
    model: ModelSettings, extraction: ExtractionSettings, split: str, unit: str, layer: int
) -> Settings:
    """What decides activations/v1 of one split (`all` for texts), unit and layer."""
    foreign = {"units", *(_LIMITS_OF_TEXTS if split != "all" else ())}
    foreign |= {"word_share"} if unit != TURN_END else set()
    foreign |= {"sentence_ends"} if split != "all" and unit != TURN_END else set()
    stored = {key: value for key, value in identity(extraction).items() if key not in foreign}
    backbone = {**identity(model), "layer": layer}
    about = {"dtype": extraction.dtype, "compute_dtype": model.dtype, "unit": unit, "split": split}
    return {**backbone, **stored, **about, **_of_conversations()}


def sae(
    folder: Path, sae: SaeSettings, seed: int, activations: Mapping[str, Path], init_seed: int | None = None
) -> FolderPlan:
    """An SAE that learns from the activations of its phases: `seed` decides the order of rows, and the first weights too if `init_seed` does not."""
    read = [name for name in _read_by(sae) if name in activations or name != MORE_RESPONSES]
    inputs = {f"activations/{name}": (activations[name], ACTIVATIONS_FOLDER) for name in read}
    return FolderPlan(folder, SAE_FOLDER, sae_settings(sae, seed, init_seed), inputs)


def _read_by(sae: SaeSettings) -> list[str]:
    """Which activations an SAE learns from or is measured on."""
    if sae.recipe == "papers":
        epochs = {"text": sae.text_epochs, "chat": sae.chat_epochs}
        return [name for name, number in epochs.items() if number]
    of_responses, of_texts = sae.shares
    return ["chat", *([RESPONSES, MORE_RESPONSES] if of_responses else []), *(["text"] if of_texts else [])]


def sae_activations(folders: Folders, data: DataSettings, sae: SaeSettings, units: Sequence[Unit]) -> dict[str, Path]:
    """Where the activations are that an SAE may learn from, by the names that its manifest gives them."""
    place = units.index(TURN_END) if sae.recipe == "turn_ends" and TURN_END in units else 0
    text = folders.text_activations.with_name(_text_name(units[place], place))
    chat = folders.chat_activations
    more = {MORE_RESPONSES: chat.with_name(MORE_RESPONSES)} if data.responses else {}
    return {"text": text, "chat": chat, RESPONSES: chat.with_name(RESPONSES), **more}


def sae_settings(sae: SaeSettings, seed: int, init_seed: int | None = None) -> Settings:
    """What decides an SAE, besides its activations."""
    foreign = OF_RECIPE["papers" if sae.recipe == "turn_ends" else "turn_ends"]
    settings = {name: value for name, value in identity(sae, seed=seed).items() if name not in foreign}
    return settings if init_seed in (None, seed) else {**settings, "init_seed": init_seed}


def sae_folders(
    folders: Folders, sae: SaeSettings, also: AlsoSaes, seed: int
) -> list[tuple[str, Path, SaeSettings, int]]:
    """(stage, folder, settings, seed of the first weights) of the SAE, and of those that learn beside it."""
    beside = also.beside(sae, seed)
    others = [(f"train SAE {name}", folders.out / "saes" / name, other, number) for name, other, number in beside]
    return [("train SAE", folders.sae, sae, seed), *others]


def reward_model(folders: Folders, variant: Variant, seed: int) -> FolderPlan:
    """A reward model: the SARM or one of its baselines."""
    reads_ends = variant.reward.head_init == "probe" or variant.reward.encoder == "random_matched"
    inputs = folders.inputs(PAIRS_FOLDER, *(["activations/chat"] if reads_ends else []))
    if variant.sae:
        inputs[SAE_FOLDER] = (variant.sae, SAE_FOLDER)
    settings = reward_settings(variant.model, variant.reward, seed)
    return FolderPlan(folders.out / variant.folder, SARM_FOLDER, settings, inputs)


def reward_settings(model: ModelSettings, reward: RewardSettings, seed: int) -> Settings:
    """What decides a reward model; penalties that are off decide nothing."""
    settings = identity(reward, seed=seed)
    for name in ("dense_weight", "head_l1"):
        if not settings[name]:
            settings.pop(name)
    return {**identity(model), **settings, **_of_conversations()}


def evaluation(folders: Folders, evaluation: EvaluationSettings, seed: int, baselines: Iterable[str]) -> FolderPlan:
    """The evaluation of the SARM beside its baselines."""
    read = (SARM_FOLDER, SAE_FOLDER, PAIRS_FOLDER, "activations/chat", "activations/heldout")
    inputs = folders.inputs(*read, *(name for name in BASELINES if name in set(baselines)))
    return FolderPlan(folders.evaluation, EVALUATION_FOLDER, evaluation_settings(evaluation, seed), inputs)


def evaluation_settings(evaluation: EvaluationSettings, seed: int) -> Settings:
    """What decides an evaluation."""
    return {**identity(evaluation, seed=seed), **_of_conversations()}


def contexts(folders: Folders, contexts: ContextsSettings) -> FolderPlan:
    """contexts/v1 of the SARM."""
    read = [SARM_FOLDER]
    read += [PAIRS_FOLDER] if contexts.split != "none" else []
    read += [CORPUS_FOLDER] if contexts.corpus else []
    settings = {**identity(contexts), **_of_conversations()}
    return FolderPlan(folders.contexts, CONTEXTS_FOLDER, settings, folders.inputs(*read))


def pages(folders: Folders, pages: PagesSettings) -> FolderPlan:
    """Feature pages: of the contexts, and of the explanations and held-out scores that are there."""
    inputs = folders.inputs(CONTEXTS_FOLDER, SARM_FOLDER)
    if pages.explanations:
        inputs[EXPLANATIONS_FOLDER] = (Path(pages.explanations).expanduser().absolute(), EXPLANATIONS_FOLDER)
    elif folders.explanations.is_dir():
        inputs |= folders.inputs(EXPLANATIONS_FOLDER)
    if pages.pairs and (folders.evaluation / "sarm_scores").is_dir():
        inputs |= folders.inputs(EVALUATION_FOLDER, PAIRS_FOLDER)
    may_lack = frozenset({EXPLANATIONS_FOLDER, EVALUATION_FOLDER, PAIRS_FOLDER})
    return FolderPlan(
        folder=folders.pages, schema=PAGES_FOLDER, settings=identity(pages), inputs=inputs, may_lack=may_lack
    )


def _of_conversations() -> Settings:
    """What decides which text and which token every stage reads: folders of other rules are not mixed with those of today."""
    return {"protocol_version": PROTOCOL_VERSION}


def with_figures(counts: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Counts, with those that a reader looks for first under `figures`."""
    figures = {name: counts[name] for name in names if name in counts}
    return {**counts, "figures": {**figures, "rejected": sum(counts.get("rejected", {}).values())}}
