"""Ray Tune over the cells of an ablation: each trial a light driver that starts Ray Train workers for one cell.

A trial that fails is started again from its training state; what was given up is written beside the cell, as is a trial that the
scheduler stopped, so that a sweep that is run again knows.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from sarm.checks import StoppedError
from sarm.config import Run, UserError
from sarm.manifest import MANIFEST, write_atomically
from sarm.runtime.cluster import Cluster
from sarm.runtime.job import say
from sarm.runtime.placement import release_placement_groups
from sarm.runtime.session import RUN_FILE, Reports
from sarm.runtime.sweeps.sweep_cells import Cell, cell_at
from sarm.runtime.sweeps.sweep_plan import SweepPlan
from sarm.runtime.sweeps.sweep_stages import do_cell
from sarm.runtime.tracking import StageRun, outbox_of
from sarm.tune_config import Sweep

# A trial waits for its workers; room for it must not be taken from them.
_TRIAL_CPUS = 0.01
_STATUS = "status.json"
_TIME, _LOSS, _ACCURACY = "percent", "loss", "heldout_accuracy"


def run_of_trials(sweep: Sweep, run: Run) -> Run:
    """The run settings with a trial's cores."""
    return replace(run, cpus_per_worker=sweep.cpus_per_trial or run.cpus_per_worker)


def trials_at_once(sweep: Sweep, run: Run, cluster: Cluster) -> int:
    """How many trials the cluster has room for side by side.

    Raises UserError if it has room for none, with what would fit.
    """
    each = max(run.num_workers, run.num_actors)
    threads = cluster.cpus_each(run_of_trials(sweep, run), each)
    slots = cluster.num_cpus if cluster.is_local else cluster.num_cpus - 1
    room = max(1, slots // (each * threads))
    if cluster.use_gpu:
        room = min(room, cluster.num_gpus // each)
    return min(room, sweep.trials_at_once or room)


def check_search(sweep: Sweep) -> None:
    """Raise UserError if Optuna is asked for and not installed."""
    if sweep.search == "optuna" and find_spec("optuna") is None:
        raise UserError(
            "--search optuna needs the package optuna. Run pip install 'sarm[optuna]', or pass another --sweep.search."
        )


def run_trials(plan: SweepPlan, cells: Sequence[Cell], cluster: Cluster, num_samples: int = 1) -> None:
    """Train and evaluate the cells; for Optuna, `num_samples` that it proposes among those of the plan."""
    sweep, run = plan.config.sweep, plan.config.run
    at_once = trials_at_once(sweep, run, cluster)
    say(f"{len(cells)} cells to do, {at_once} at a time")
    storage = run.out / ".ray_tune"
    shutil.rmtree(storage, ignore_errors=True)
    # Reports during training have no held-out accuracy yet, which Optuna is told at the end.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Ray Tune would answer Ctrl-C itself, and go on with what comes after the trials.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Its tables count trials by id; the lines of `Watch` name the cells.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    threads = cluster.cpus_each(run_of_trials(sweep, run), max(run.num_workers, run.num_actors))
    trial = tune.with_parameters(run_trial, plan=plan, threads=threads)
    watch = Watch(plan)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": _TRIAL_CPUS}),
        param_space=_space(plan, cells),
        tune_config=tune.TuneConfig(
            search_alg=_searcher(plan, cells),
            scheduler=scheduler_of(sweep),
            num_samples=num_samples,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=sweep.retries),
            callbacks=[watch],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except SystemError as error:
        # What SIGTERM raises inside Ray's compiled code comes out as the cause of this.
        if isinstance(error.__cause__, StoppedError):
            raise error.__cause__ from None
        raise
    finally:
        watch.release(run.out / "cells")
        shutil.rmtree(storage, ignore_errors=True)


def scheduler_of(sweep: Sweep) -> Any:
    """Every trial to its end, or the worse ones stopped early by their loss."""
    if sweep.search != "asha":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr=_TIME,
        metric=_LOSS,
        mode="min",
        max_t=100,
        grace_period=sweep.grace_percent,
        reduction_factor=sweep.reduction_factor,
        # A trial that has trained to the end is still to be evaluated.
        stop_last_trials=False,
    )


def _space(plan: SweepPlan, cells: Sequence[Cell]) -> dict[str, Any]:
    sweep = plan.config.sweep
    if sweep.search != "optuna":
        return {"cell": tune.grid_search([plan.name(cell) for cell in cells])}
    axes = {"layer": sweep.layers, "width": sweep.widths, "k": sweep.ks}
    return {
        name: tune.choice(list(values))
        for name, values in {**axes, "component": sweep.components, "seed": sweep.seeds}.items()
    }


def cell_of(plan: SweepPlan, config: Mapping[str, Any]) -> Cell:
    """The cell that a trial's parameters name, or that lies where they point."""
    if "cell" in config:
        return next(cell for cell in plan.cells if plan.name(cell) == config["cell"])
    return cell_at(plan.config.sweep, **config)


def _searcher(plan: SweepPlan, cells: Sequence[Cell]) -> Any:
    if plan.config.sweep.search != "optuna":
        return None
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(metric=_ACCURACY, mode="max", seed=plan.config.run.seed)


def run_trial(config: Mapping[str, Any], plan: SweepPlan, threads: int) -> dict[str, Any]:
    """One trial. A mistake that no second try would mend is said in its result, not raised."""
    torch.set_num_threads(threads)
    cell = cell_of(plan, config)
    plan = plan._replace(
        config=replace(plan.config, run=replace(plan.config.run, cpus_per_worker=threads, ray_address=""))
    )
    reports = Reports(plan.config.sweep.report_steps, (TuneReportCallback(),))
    try:
        found = do_cell(plan, cell, reports)
    except UserError as error:
        mark(plan.cell_folder(cell), "failed", str(error))
        return {_TIME: 100}
    loss = _last_loss(plan.cell_folder(cell), plan.config.sweep.report_steps)
    return {_TIME: 100, _LOSS: loss, _ACCURACY: found.counts["figures"]["heldout_accuracy"]}


def _last_loss(folder: Path, steps: int) -> float:
    """The mean loss of the last steps of the cell's training."""
    (path,) = folder.glob("*/history.json")
    (history,) = json.loads(path.read_text()).values()
    last = [entry["loss"] for entry in history[-steps:]]
    return sum(last) / len(last)


def mark(folder: Path, status: str, reason: str) -> None:
    """Write down why the cell has no result."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _STATUS, json.dumps({"status": status, "reason": reason}))


def status_of(plan: SweepPlan, cell: Cell) -> tuple[str, str]:
    """(done, stopped, failed or missing; the reason)."""
    folder = plan.cell_folder(cell)
    if (folder / "evaluation" / MANIFEST).exists():
        return "done", ""
    try:
        found = json.loads((folder / _STATUS).read_text())
    except (OSError, json.JSONDecodeError):
        return "missing", ""
    return found["status"], found["reason"]


class Watch(tune.Callback):
    """Says in the driver what becomes of each trial, marks what has no result, and gives back what a stopped trial still holds."""

    def __init__(self, plan: SweepPlan):
        self._plan = plan

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        say(f"{self._name(trial)}: started")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.release(self._folder(trial))
        say(f"{self._name(trial)}: failed, starting again from its last state")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.release(self._folder(trial))
        reason = _reason(trial)
        mark(self._folder(trial), "failed", reason)
        self._end_run(trial, "FAILED")
        say(f"{self._name(trial)}: failed: {reason}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        folder, result = self._folder(trial), trial.last_result or {}
        self.release(folder)
        status, reason = status_of(self._plan, cell_of(self._plan, trial.config))
        if status == "missing":
            # Neither a result nor a reason: the scheduler stopped it.
            status = "stopped"
            reason = f"stopped at {result.get(_TIME, 0)} % of its training with loss {result.get(_LOSS, math.nan):.4f}"
            mark(folder, status, reason)
            self._end_run(trial, "KILLED")
        accuracy = f"held-out accuracy {result[_ACCURACY]:.3f}" if status == "done" and _ACCURACY in result else reason
        say(f"{self._name(trial)}: {status}, {accuracy}")

    def release(self, folder: Path) -> None:
        """Remove the placement groups that trained under the folder."""
        if folder.exists():
            release_placement_groups(folder)

    def _folder(self, trial: Any) -> Path:
        return self._plan.cell_folder(cell_of(self._plan, trial.config))

    def _name(self, trial: Any) -> str:
        return self._plan.name(cell_of(self._plan, trial.config))

    def _end_run(self, trial: Any, status: str) -> None:
        with contextlib.suppress(OSError, KeyError, json.JSONDecodeError):
            known = json.loads((self._folder(trial) / RUN_FILE).read_text())
            outbox = outbox_of(self._plan.run(cell_of(self._plan, trial.config)))
            # Not the address in the file: the folder may have been moved since.
            StageRun(self._plan.mlflow_uri, known["mlflow_run_id"], outbox).end(status)


def _reason(trial: Any) -> str:
    """The last line of what the trial died of."""
    try:
        lines = Path(trial.error_file).read_text().strip().splitlines()
    except (OSError, TypeError):
        return "no reason given"
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
