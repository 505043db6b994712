"""A sweep's folder taken apart: what a stage of it and all later ones have written."""

from pathlib import Path

from sarm.contracts.manifest import MANIFEST
from sarm.settings.checks import UserError
from sarm.settings.run import STAGES, StageName
from sarm.settings.sweep import Ablation
from sarm.stages.chain_state import move, was_moved
from sarm.stages.sweep.plan import SweepFolders, SweepPlan, claim_sweep

# In the order of the stages; what a sweep has behind its cells is its report.
_FOLDERS: dict[StageName, tuple[str, ...]] = {
    "prepare_data": ("corpus", "pairs"),
    "extract_activations": ("activations",),
    "train_sae": ("sae", "training"),
    "train_sarm": ("cells", "report"),
}


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
