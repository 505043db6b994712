"""A sweep's folder taken apart: what a stage of it and all later ones have written."""

import os
from pathlib import Path

from sarm.config import UserError
from sarm.manifest import MANIFEST
from sarm.runtime.chain_state import STAGES, move
from sarm.runtime.supervisor import STARTED_AGAIN
from sarm.runtime.sweeps.sweep_plan import SWEEP_FILE, SweepFolders, SweepPlan
from sarm.tune_config import Ablation

# In the order of the stages; what a sweep has behind its cells is its report.
_FOLDERS = {
    "prepare_data": ("corpus", "pairs"),
    "extract_activations": ("activations",),
    "train_sae": ("sae", "training"),
    "train_sarm": ("cells", "report", SWEEP_FILE),
}


def move_sweep_aside(config: Ablation) -> Path | None:
    """Do what `redo_from` asks for in a sweep's folder; returns where the old folders are, None if nothing moved.

    Raises UserError for a stage that sweeps do not have.
    """
    run = config.run
    if run.redo_from is None or os.environ.get(STARTED_AGAIN):
        return None
    if run.redo_from not in _FOLDERS:
        raise UserError(f"a sweep has no stage {run.redo_from}. Pass --redo-from {', '.join(_FOLDERS)}.")
    first = STAGES.index(run.redo_from)
    names = [name for stage, names in _FOLDERS.items() if STAGES.index(stage) >= first for name in names]
    return move([run.out / name for name in names if (run.out / name).exists()], run.out)


def refuse_unshared(plan: SweepPlan) -> None:
    """Raise UserError unless what the cells share is finished: `only` asks for their own work alone."""
    folders = SweepFolders(plan.config.run.out)
    shared = [folders.pairs, *(plan.sae_folder(key) for key in plan.saes)]
    if missing := [path for path in shared if not (path / MANIFEST).exists()]:
        raise UserError(f"--only runs the cells alone, and {missing[0]} is not finished. Run the same command without --only.")  # fmt: skip
