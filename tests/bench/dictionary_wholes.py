"""The study of dictionaries in whole trainings: every fold of prompts held out in turn, through the platform's own chain.

For each fold and seed: a SARM on the demo's dictionary, a scalar head on the same backbone, a SARM on a random encoder that is treated
alike, and a SARM on a dictionary by the papers' recipe. Twenty minutes each on 2 cores; what is finished is used again.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dictionary_folds import FOLDS, fold_of

from sarm.contracts.folders import Folders
from sarm.data.sources.prepare import prepare_pairs
from sarm.data.sources.responses import prepare_responses
from sarm.data.store.parts import read_parts
from sarm.evaluate.intervals import difference_interval, share_interval
from sarm.evaluate.readability import READABLE
from sarm.evaluate.statistics import pair_credit
from sarm.settings.extraction import TURN_END, Unit
from sarm.settings.jobs import Evaluate, ExtractActivations, Pipeline
from sarm.settings.presets import PRESETS
from sarm.stages import plan

# Of a fold, what all its trainings read.
_SHARED = ("corpus", "pairs", "responses", "activations")
BESIDE = ("scalar_head", "random_encoder", "papers")
_MODELS = {
    "sarm": ("turn_ends", "sarm"),
    "scalar_head": ("turn_ends", "scalar_head"),
    "random_encoder": ("turn_ends", "sarm_random_encoder"),
    "papers": ("papers", "sarm"),
}


def trained(preset: Pipeline, work: Path, folds: Sequence[int], seeds: int, beside: Sequence[str]) -> dict[str, Any]:
    """All trainings that are missing, and the summary of those that are there; `beside` are the models that SARM is compared with."""
    from sarm.stages.chain import run_chain

    flags = {"scalar_head": "scalar", "random_encoder": "random_encoder"}
    recipes = {"turn_ends": (preset.sae, tuple(flag for name, flag in flags.items() if name in beside))}
    units: tuple[Unit, ...] = (TURN_END,)
    if "papers" in beside:
        # Of a preset that has no other recipe, its own twice: whether it runs.
        recipes["papers"] = (PRESETS.get(f"{preset.run.out.name}-papers", ("", preset))[1].sae, ())
        units = ("document", TURN_END)
    base = replace(preset, extraction=replace(preset.extraction, units=units))
    for fold in folds:
        root = work / f"fold{fold}"
        run = replace(base.run, out=root / "shared", cpus_per_worker=1, experiment="dictionaries")
        write_split(base, Folders(run.out), fold)
        run_chain(replace(base.part(ExtractActivations), run=run))
        for seed in range(seeds):
            for name, (sae, baselines) in recipes.items():
                out = root / f"{name}-seed{seed}"
                shared_parts(run.out, out)
                config = replace(base, sae=sae, reward=replace(base.reward, baselines=baselines), run=replace(run, out=out, seed=seed))  # fmt: skip
                run_chain(config.part(Evaluate))
                print(f"fold {fold} seed {seed} {name}: done", flush=True)
    return summary(work)


def shared_parts(source: Path, out: Path) -> None:
    """Copy what all trainings of a fold read into the folder of one of them."""
    out.mkdir(parents=True, exist_ok=True)
    for shared in _SHARED:
        if (source / shared).exists() and not (out / shared).exists():
            shutil.copytree(source / shared, out / shared)


def write_split(config: Pipeline, folders: Folders, fold: int) -> None:
    """pairs/v1 and responses/v1 with the prompts of a fold held out, in the place of the platform's own split."""
    if (folders.pairs / "manifest.json").exists():
        return
    drawn = folders.out / "drawn"
    counts = prepare_pairs(config.data, drawn)
    folder = plan.pairs(folders, config.data).open()
    folder.claim()
    rows = [
        {**row, "split": "heldout" if fold_of(row["prompt_id"]) == fold else "train"}
        for path in sorted(drawn.glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    schema = pq.read_schema(next(drawn.glob("*.parquet")))
    pq.write_table(pa.Table.from_pylist(rows, schema), folders.pairs / "part-00000.parquet", write_page_checksum=True)
    splits = {split: sum(row["split"] == split for row in rows) for split in ("train", "heldout")}
    # Which prompts are alike was found for another split.
    folder.finish({**counts, "splits": splits, "near_duplicate_prompts": 0, "near_duplicate_pairs": 0})
    if config.data.responses:
        _write_responses(config, folders, fold, drawn)
    shutil.rmtree(drawn)


def _write_responses(config: Pipeline, folders: Folders, fold: int, pairs: Path) -> None:
    """responses/v1 without those of the fold's prompts."""
    every = folders.out / "drawn-responses"
    counts = prepare_responses(replace(config.data, heldout_share=1e-9), pairs, every)
    table = pa.concat_tables([pq.read_table(path) for path in sorted(every.glob("*.parquet"))])
    table = table.filter(pa.array([fold_of(prompt) != fold for prompt in table["prompt_id"].to_pylist()]))
    folder = plan.responses(folders, config.data).open()
    folder.claim()
    pq.write_table(table, folders.responses / "part-00000.parquet", write_page_checksum=True)
    folder.finish({**counts, "rows": table.num_rows})
    shutil.rmtree(every)


def summary(work: Path) -> dict[str, Any]:
    """Accuracies, and differences from the SARM with intervals by prompt: over the pairs of all finished folds, the mean of their seeds."""
    credits: dict[str, dict[str, list[float]]] = {name: {} for name in _MODELS}
    prompts: dict[str, str] = {}
    figures: dict[str, list[Mapping[str, Any]]] = {"turn_ends": [], "papers": []}
    for fold in range(FOLDS):
        for out in sorted((work / f"fold{fold}").glob("*-seed*")):
            if not (out / "evaluation" / "manifest.json").exists():
                continue
            recipe = out.name.rpartition("-seed")[0]
            figures[recipe].append(json.loads((out / "evaluation" / "metrics.json").read_text()))
            for name, (own, folder) in _MODELS.items():
                place = out / "evaluation" / f"{folder}_scores"
                # A baseline that was not asked for is not there.
                if own == recipe and place.exists():
                    scores = read_parts(place)
                    right = pair_credit(scores["chosen_reward"].to_numpy() - scores["rejected_reward"].to_numpy())
                    for pair, prompt, credit in zip(scores["pair_id"].to_pylist(), scores["prompt_id"].to_pylist(), right, strict=True):  # fmt: skip
                        credits[name].setdefault(pair, []).append(float(credit))
                        prompts[pair] = prompt
    found: dict[str, Any] = {"trainings": {recipe: len(own) for recipe, own in figures.items()}, "held_out_prompts": len(set(prompts.values()))}  # fmt: skip
    for name, own in credits.items():
        if own:
            values = np.array([np.mean(seeds) for seeds in own.values()])
            low, high = share_interval(values, np.array([prompts[pair] for pair in own]))
            found[f"{name}_accuracy"] = [float(values.mean()), low, high]
        common = [pair for pair in credits["sarm"] if pair in own]
        if name != "sarm" and common:
            gain = np.array([np.mean(credits["sarm"][pair]) - np.mean(own[pair]) for pair in common])
            low, high = difference_interval(gain, np.array([prompts[pair] for pair in common]))
            found[f"sarm_minus_{name}"] = [float(gain.mean()), low, high]
    for recipe, metrics in figures.items():
        for key in READABLE:
            values = [one["readability"][key] for one in metrics if one["readability"].get(key) is not None]
            plain = [value["value"] if isinstance(value, Mapping) else value for value in values]
            if plain:
                found[f"{recipe}_{key}"] = float(np.mean(plain))
        for key in ("fvu", "fvu_pca", "reward_fidelity"):
            if metrics:
                found[f"{recipe}_{key}"] = float(np.mean([one["sae_on_heldout"][key] for one in metrics]))
    return found
