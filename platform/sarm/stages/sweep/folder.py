"""A sweep's folder: what all its cells have in common, and what a stage of it and all later ones have written."""

import json
from pathlib import Path
from typing import Any

from sarm.contracts.folders import SWEEP_FILE
from sarm.contracts.manifest import MANIFEST, first_difference, write_atomically
from sarm.engine.session import RUN_FILE
from sarm.settings.checks import UserError
from sarm.settings.identity import identity
from sarm.settings.run import STAGES, StageName
from sarm.settings.sweep import Ablation
from sarm.stages.chain_state import move, was_moved
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.readings import SweepFolders

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
# In the order of the stages; what a sweep has behind its cells is its report.
_FOLDERS: dict[StageName, tuple[str, ...]] = {
    "prepare_data": ("corpus", "pairs"),
    "extract_activations": ("activations",),
    "train_sae": ("sae", "training"),
    "train_sarm": ("cells", "report"),
}


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
    plain: dict[str, Any] = json.loads(json.dumps(shared))
    return plain


def move_sweep_aside(config: Ablation) -> Path | None:
    """Do what `redo_from` asks for in a sweep's folder, and note the settings of what is made anew; returns where the old folders are.

    Raises UserError if somebody writes to one of them; nothing has been moved then.
    """
    run = config.run
    if run.redo_from is None or was_moved(run.out):
        return None
    first = STAGES.index(run.redo_from)
    names = [name for stage, names in _FOLDERS.items() if STAGES.index(stage) >= first for name in names]
    aside = move([run.out / name for name in names if (run.out / name).exists()], run.out)
    claim_sweep(config)
    return aside


def refuse_unshared(plan: SweepPlan) -> None:
    """Raise UserError unless what the cells share is finished: `only` asks for their own work alone."""
    folders = SweepFolders(plan.config.run.out)
    shared = [folders.pairs, *(plan.sae_folder(key) for key in plan.saes)]
    if missing := [path for path in shared if not (path / MANIFEST).exists()]:
        raise UserError(f"--only runs the cells alone, and {missing[0]} is not finished. Run the same command without --only.")  # fmt: skip
