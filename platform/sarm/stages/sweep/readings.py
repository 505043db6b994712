"""What of the texts and pairs is read for a sweep, at all layers of a pass, and the folders that it goes to."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.folders import Folders
from sarm.settings.extraction import TURN_END, ExtractionSettings
from sarm.settings.model import ModelSettings
from sarm.settings.sweep import Ablation
from sarm.stages import plan
from sarm.stages.plan import MORE_RESPONSES, RESPONSES, UNPAIRED

_HASH_LENGTH = 8


class Reading(NamedTuple):
    """A pass over texts and pairs that all layers of its model come from; the model's own layer counts for nothing."""

    model: ModelSettings
    extraction: ExtractionSettings


def reading_of(settings: Ablation, unit: Any) -> Reading:
    """The pass that takes this unit of the texts."""
    own: dict[str, Any] = {"units": (unit,)}
    if unit == "token":
        # Of fewer texts: every token of the whole corpus at every layer would fill terabytes.
        own["limit_tokens"] = settings.sweep.token_rows
    return Reading(replace(settings.model, layer=1), replace(settings.extraction, **own))


@functools.lru_cache(maxsize=1024)
def contents_of(reading: Reading) -> dict[str, dict[str, Any]]:
    """What decides each folder of activations of a pass, whatever the layer."""
    (unit,) = reading.extraction.units
    of = {"text": ("all", unit), "chat": ("train", "chat"), "heldout": ("heldout", "chat")}
    if unit == TURN_END:
        of |= {RESPONSES: ("train", unit), MORE_RESPONSES: (UNPAIRED, unit)}
    return {name: plan.activation_settings(*reading, *split_and_unit, 1) for name, split_and_unit in of.items()}


@dataclass(frozen=True)
class SweepFolders(Folders):
    """Where the shared stages of a sweep write: a folder for each layer, and in it one for each reading of texts and of pairs."""

    names: Mapping[str, str] = field(default_factory=dict)
    """What activations of other settings than the sweep's own are called."""

    def activations(self, name: str, layer: int, first_layer: int) -> Path:
        return self.out / "activations" / f"layer{layer}" / self.called(name)

    def called(self, name: str) -> str:
        """What the folder of these activations is called."""
        return self.names.get(name, name)


def folders_of(config: Ablation, reading: Reading) -> SweepFolders:
    """Where a pass writes; one with the sweep's own settings has the plain names."""
    (unit,) = reading.extraction.units
    mine, own = contents_of(reading), contents_of(reading_of(config, unit))
    names = {name: name if mine[name] == own[name] else f"{name}-{digest(mine[name])}" for name in mine}
    if unit != config.extraction.units[0]:
        names["text"] = names["text"].replace("text", f"text-{unit}", 1)
    return SweepFolders(config.run.out, names)


@dataclass(frozen=True)
class CellFolders(Folders):
    """The folders of one cell as its stages see them: its own, and those of the sweep that it shares."""

    sweep: SweepFolders
    layer: int
    sae_folder: Path | None

    corpus = property(lambda self: self.sweep.corpus)
    pairs = property(lambda self: self.sweep.pairs)
    text_activations = property(lambda self: self.sweep.activations("text", self.layer, self.layer))
    chat_activations = property(lambda self: self.sweep.activations("chat", self.layer, self.layer))
    heldout_activations = property(lambda self: self.sweep.activations("heldout", self.layer, self.layer))
    sae = property(lambda self: self.sae_folder or self.out / "no-sae")


def digest(settings: Any) -> str:
    """A short name for settings that are JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_HASH_LENGTH]
