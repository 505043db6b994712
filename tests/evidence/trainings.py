"""Whole trainings by the demo's settings: every fold of prompts held out in turn, three seeds of each.

A piece is one fold, one seed and one recipe of the dictionary; where there is one, the baselines that share its pairs are trained with it.
"""

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.evidence import credits
from tests.evidence.pieces import ROOT, Piece

from sarm.contracts.folders import Folders
from sarm.contracts.manifest import read_json
from sarm.settings.extraction import TURN_END
from sarm.settings.identity import identity
from sarm.settings.jobs import Evaluate, ExtractActivations, Pipeline
from sarm.settings.presets import PRESETS
from sarm.settings.sae import SaeSettings

sys.path.append(str(ROOT / "tests" / "bench"))

from dictionary_folds import FOLDS
from dictionary_wholes import shared_parts, write_split

SEEDS = (0, 1, 2)
MODELS = {
    "sarm": "sarm",
    "scalar_head": "scalar_head",
    "scalar_head_full": "scalar_head_full",
    "random_encoder": "sarm_random_encoder",
    "random_linear": "sarm_random_linear",
}
"""Names of models, and what the chain calls their folders."""


class Recipe(NamedTuple):
    """A dictionary's settings and the baselines that are trained beside its SARM."""

    sae: SaeSettings
    baselines: tuple[str, ...] = ()


def recipes(preset: Pipeline, papers: Pipeline) -> dict[str, Recipe]:
    """What is compared: the preset's dictionary, that without the reward's direction, and the papers'."""
    beside = ("scalar", "scalar_full", "random_encoder", "random_linear")
    return {
        "ours": Recipe(preset.sae, beside),
        "unaware": Recipe(replace(preset.sae, reward_share=0.0)),
        "papers": Recipe(papers.sae),
    }


def training_pieces(preset_name: str = "demo", papers_name: str = "demo-papers", seeds: tuple[int, ...] = SEEDS) -> list[Piece]:  # fmt: skip
    """All pieces, those of one fold after each other, so that its activations are extracted once."""
    preset = PRESETS[preset_name][1]
    found = recipes(preset, PRESETS[papers_name][1])
    return [
        _piece(preset_name, preset, fold, seed, name, recipe)
        for fold in range(FOLDS)
        for seed in seeds
        for name, recipe in found.items()
    ]


def _piece(preset_name: str, preset: Pipeline, fold: int, seed: int, name: str, recipe: Recipe) -> Piece:
    settings = {
        "preset": preset_name,
        "fold": fold,
        "seed": seed,
        "recipe": name,
        "baselines": list(recipe.baselines),
        "model": identity(preset.model),
        "sae": identity(recipe.sae),
        "reward": identity(preset.reward),
    }

    def measure(work: Path) -> dict[str, Any]:
        return _measured(preset=preset, work=work / preset_name, fold=fold, seed=seed, name=name, recipe=recipe)

    return Piece(f"trainings/{preset_name}/fold{fold}/seed{seed}/{name}", settings, measure)


def _measured(*, preset: Pipeline, work: Path, fold: int, seed: int, name: str, recipe: Recipe) -> dict[str, Any]:
    from sarm.stages.chain import run_chain

    base = replace(preset, extraction=replace(preset.extraction, units=("document", TURN_END)))
    run = replace(base.run, out=work / f"fold{fold}" / "shared", experiment="evidence")
    write_split(base, Folders(run.out), fold)
    run_chain(replace(base.part(ExtractActivations), run=run))
    out = work / f"fold{fold}" / f"seed{seed}" / name
    shared_parts(run.out, out)
    reward = replace(base.reward, baselines=recipe.baselines)
    own = replace(base, sae=recipe.sae, reward=reward, run=replace(run, out=out, seed=seed))
    run_chain(own.part(Evaluate))
    folders = Folders(out)
    found = {
        "fold": fold,
        "seed": seed,
        "recipe": name,
        **credits.of_evaluation(folders.evaluation, MODELS),
        "figures": _figures(read_json(folders.evaluation / "metrics.json")),
    }
    # Weights of a model are half a gigabyte, and what they say is kept.
    for model in MODELS.values():
        shutil.rmtree(out / model, ignore_errors=True)
    return found


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an evaluation beside its credits: the dictionary on held-out answers, and whether the reward can be read."""
    readable = {name: one["value"] if isinstance(one, Mapping) else one for name, one in metrics["readability"].items()}
    kept = ("fvu", "fvu_pca", "reward_fidelity", "alive_share", "l0")
    return {**{name: metrics["sae_on_heldout"].get(name) for name in kept}, **readable}
