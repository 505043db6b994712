"""An ablation with its model's width: the settings, names and folders of every SAE and cell."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.folders import Folders
from sarm.contracts.manifest import first_difference, write_atomically
from sarm.engine.session import RUN_FILE
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.settings.model import ModelSettings
from sarm.settings.reward import RANDOM_ENCODERS, RewardSettings
from sarm.settings.run import RunSettings, StageName
from sarm.settings.sae import SaeSettings
from sarm.settings.sweep import Ablation
from sarm.stages import plan
from sarm.stages.chain_state import was_moved
from sarm.stages.sweep.cells import Cell, SaeKey, layers_of, sae_key, saes_of

SWEEP_FILE = "sweep.json"
# Which stage of a sweep each part of what its cells have in common decides, in the order of the stages.
_DECIDES: dict[str, StageName] = {
    "data": "prepare_data",
    "model": "extract_activations",
    "extraction": "extract_activations",
    "token_rows": "extract_activations",
    "sae": "train_sae",
    "order_seed": "train_sae",
    "reward": "train_sarm",
    "evaluation": "train_sarm",
}
_HASH_LENGTH = 8


class SweepPlan(NamedTuple):
    """An ablation with its cells and the width that its dictionaries are multiples of; picklable."""

    config: Ablation
    cells: tuple[Cell, ...]
    d_in: int
    mlflow_uri: str = ""
    parent_run_id: str = ""

    def model(self, layer: int) -> ModelSettings:
        """The model cut at `layer`; the whole backbone's cut is the component's own affair."""
        return replace(self.config.model, layer=layer or self.layers[0])

    @property
    def layers(self) -> list[int]:
        """All layers that activations are needed of, lowest first."""
        return layers_of(self.cells, self.config.model.layer)

    @property
    def saes(self) -> list[SaeKey]:
        """The distinct SAEs, those of one layer and unit together."""
        return saes_of(self.cells, self.config.extraction.units)

    def sae(self, key: SaeKey) -> SaeSettings:
        """Its settings."""
        return replace(self.config.sae, d_sae=key.width * self.d_in, k=key.k)

    def sae_settings(self, key: SaeKey) -> dict[str, Any]:
        """What decides it: the rows of all SAEs come in the order of the sweep's seed, so that they can learn from one read."""
        return plan.sae_settings(self.sae(key), self.config.run.seed, key.seed)

    def sae_folder(self, key: SaeKey) -> Path:
        name = f"layer{key.layer}-x{key.width}-k{key.k}-s{key.seed}{'-token' * (key.unit == 'token')}"
        settings = {**self.sae_settings(key), "layer": key.layer, "unit": key.unit}
        return self.config.run.out / "sae" / f"{name}-{digest(settings)}"

    def reward(self, cell: Cell) -> RewardSettings:
        """How the cell's reward model is trained."""
        reward = self.config.reward
        if cell.component == "sarm":
            return reward
        key = sae_key(cell, self.config.extraction.units)
        token_sae = self.sae_folder(key) if cell.component == "token_sae" and key is not None else None
        return replace(reward, baselines=(cell.component,), token_sae=token_sae)

    def name(self, cell: Cell) -> str:
        """What a reader calls the cell; unique within the sweep."""
        parts = [cell.component.replace("_", "-")]
        parts += [f"layer{cell.layer}"] * bool(cell.layer) + [f"x{cell.width}-k{cell.k}"] * bool(cell.width)
        return "-".join([*parts, f"s{cell.seed}"])

    def cell_folder(self, cell: Cell) -> Path:
        """Where the cell's reward model and figures are: found by everything that decides them."""
        key = sae_key(cell, self.config.extraction.units)
        # What a component's name means decides the folder too: a cell of an older meaning is not found.
        reward = replace(self.config.reward, encoder=RANDOM_ENCODERS.get(cell.component, self.config.reward.encoder))
        settings = {
            "cell": list(cell),
            "sae": None if key is None else self.sae_settings(key),
            "reward": plan.reward_settings(self.model(cell.layer), reward, cell.seed),
            "evaluation": plan.evaluation_settings(self.config.evaluation, cell.seed),
        }
        return self.config.run.out / "cells" / f"{self.name(cell)}-{digest(settings)}"

    def run(self, cell: Cell) -> RunSettings:
        """The run settings of the cell's stages."""
        run = self.config.run
        return replace(run, out=self.cell_folder(cell), seed=cell.seed, mlflow_uri=self.mlflow_uri)


def sweep_plan(config: Ablation, cells: Iterable[Cell], d_in: int) -> SweepPlan:
    """The plan; raises UserError for a k that its dictionary does not hold."""
    found = SweepPlan(config, tuple(cells), d_in)
    for key in found.saes:
        if key.k > key.width * d_in:
            raise UserError(
                f"k={key.k} is more than the {key.width} x {d_in} latents of the smallest dictionary. Pass a smaller --sweep.ks, or larger --sweep.widths."
            )
    return found


def refuse_other_sweep(config: Ablation) -> None:
    """Raise UserError if the folder is of a sweep that differs in more than its cells and what `redo_from` makes anew, or of something else."""
    run, path = config.run, config.run.out / SWEEP_FILE
    stages = list(dict.fromkeys(_DECIDES.values()))
    if run.redo_from is not None and run.redo_from not in stages:
        raise UserError(f"a sweep has no stage {run.redo_from}. Pass --redo-from {', '.join(stages)}.")
    anew = stages[stages.index(run.redo_from) :] if run.redo_from is not None and not was_moved(run.out) else []
    if path.exists():
        old, new = json.loads(path.read_text()), _in_common(config)
        for name, stage in _DECIDES.items():
            if stage not in anew and (difference := first_difference(old.get(name), new.get(name), name)):
                raise UserError(
                    f"{run.out} is a sweep with {difference}. Only the cells may change in one folder: pass another --out, or --redo-from {stage}, which moves what was made with other settings aside."
                )
    elif run.out.exists() and any(path.name != RUN_FILE for path in run.out.iterdir()):
        raise UserError(f"{run.out} holds something that is no sweep. Pass another --out.")


def claim_sweep(config: Ablation) -> None:
    """Write down what all cells of the folder have in common."""
    config.run.out.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run.out / SWEEP_FILE, json.dumps(_in_common(config), indent=2))


def _in_common(config: Ablation) -> dict[str, Any]:
    shared = {
        "model": {key: value for key, value in identity(config.model).items() if key != "layer"},
        "data": identity(config.data),
        "extraction": identity(config.extraction),
        "token_rows": config.sweep.token_rows,
        "sae": {key: value for key, value in identity(config.sae).items() if key not in ("d_sae", "k")},
        "reward": identity(config.reward),
        "evaluation": identity(config.evaluation),
        "order_seed": config.run.seed,
    }
    return json.loads(json.dumps(shared))


@dataclass(frozen=True)
class SweepFolders(Folders):
    """Where the shared stages of a sweep write: a folder of activations for each layer, and in it one of texts for each unit."""

    texts: str = "text"

    def activations(self, name: str, layer: int, first_layer: int) -> Path:
        return self.out / "activations" / f"layer{layer}" / (self.texts if name == "text" else name)


@dataclass(frozen=True)
class CellFolders(Folders):
    """The folders of one cell as its stages see them: its own, and those of the sweep that it shares."""

    sweep: Path
    layer: int
    sae_folder: Path | None

    corpus = property(lambda self: self.sweep / "corpus")
    pairs = property(lambda self: self.sweep / "pairs")
    text_activations = property(lambda self: self.sweep / "activations" / f"layer{self.layer}" / "text")
    chat_activations = property(lambda self: self.sweep / "activations" / f"layer{self.layer}" / "chat")
    heldout_activations = property(lambda self: self.sweep / "activations" / f"layer{self.layer}" / "heldout")
    sae = property(lambda self: self.sae_folder or self.out / "no-sae")


def digest(settings: Any) -> str:
    """A short name for settings that are JSON."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_HASH_LENGTH]
