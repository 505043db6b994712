"""Ray Tune over the cells of an ablation: each trial a light driver that starts Ray Train workers for one cell.

A trial that fails is started again from its training state; what was given up is written beside the cell, as is a trial that the
scheduler stopped, so that a sweep that is run again knows.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from sarm.contracts.manifest import MANIFEST, write_atomically
from sarm.engine.mlflow.tracking import StageRun, outbox_of
from sarm.engine.ray import trials
from sarm.engine.ray.placement import release_placement_groups
from sarm.engine.ray.room import Cluster
from sarm.engine.ray.trials import ACCURACY, LOSS, TIME
from sarm.engine.session import RUN_FILE, Reports
from sarm.engine.terminal import say
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings
from sarm.settings.sweep import SweepSettings
from sarm.stages.sweep.plan import SweepPlan
from sarm.stages.sweep.points import Cell
from sarm.stages.sweep.stages import do_cell

_STATUS = "status.json"
Run = TypeVar("Run", bound=RunSettings)


def run_of_trials(sweep: SweepSettings, run: Run) -> Run:
    """The run settings with a trial's cores, and one worker where no number is asked for: trials run side by side."""
    return replace(
        run,
        cpus_per_worker=sweep.cpus_per_trial or run.cpus_per_worker,
        num_workers=max(1, run.num_workers),
        num_actors=max(1, run.num_actors),
    )


def trials_at_once(sweep: SweepSettings, run: RunSettings, cluster: Cluster) -> int:
    """How many trials the cluster has room for side by side.

    Raises UserError if it has room for none, with what would fit.
    """
    of_trials = run_of_trials(sweep, run)
    each = max(of_trials.num_workers, of_trials.num_actors)
    threads = cluster.cpus_each(of_trials, each)
    room = max(1, cluster.places(threads) // each)
    return min(room, sweep.trials_at_once or room)


def check_search(sweep: SweepSettings) -> None:
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
    of_trials = run_of_trials(sweep, run)
    threads = cluster.cpus_each(of_trials, max(of_trials.num_workers, of_trials.num_actors))
    watch = Watch(plan)
    try:
        trials.run_trials(
            run_trial,
            {"plan": plan, "threads": threads},
            sweep,
            watch,
            space=_space(plan, cells),
            num_samples=num_samples,
            at_once=at_once,
            seed=run.seed,
            storage=run.out / ".ray_tune",
        )
    finally:
        watch.release(run.out / "cells")


def _space(plan: SweepPlan, cells: Sequence[Cell]) -> dict[str, Any]:
    sweep = plan.config.sweep
    if sweep.search != "optuna":
        return trials.each_of("cell", [plan.name(cell) for cell in cells])
    axes = {"layer": sweep.layers, "width": sweep.widths, "k": sweep.ks}
    # By number, since searchers take no values of several items.
    axes |= {axis.name: tuple(range(len(axis.values))) for axis in sweep.settings_axes}
    return trials.choices({**axes, "component": sweep.components, "seed": sweep.seeds})


def cell_of(plan: SweepPlan, config: Mapping[str, Any]) -> Cell:
    """The cell that a trial's parameters name, or that lies where they point."""
    if "cell" in config:
        return next(cell for cell in plan.cells if plan.name(cell) == config["cell"])
    values = [axis.values[config[axis.name]] for axis in plan.config.sweep.settings_axes]
    point = (config["layer"], config["width"], config["k"], *values)
    return plan.cell_at(point, config["component"], config["seed"])


def run_trial(config: Mapping[str, Any], plan: SweepPlan, threads: int) -> dict[str, Any]:
    """One trial. A mistake that no second try would mend is said in its result, not raised."""
    torch.set_num_threads(threads)
    cell = cell_of(plan, config)
    run = replace(run_of_trials(plan.config.sweep, plan.config.run), cpus_per_worker=threads, ray_address="")
    plan = plan._replace(config=replace(plan.config, run=run))
    reports = Reports(plan.config.sweep.report_steps, trials.training_reports())
    try:
        found = do_cell(plan, cell, reports)
    except UserError as error:
        mark(plan.cell_folder(cell), "failed", str(error))
        return {TIME: 100}
    loss = _last_loss(plan.cell_folder(cell), plan.config.sweep.report_steps)
    return {TIME: 100, LOSS: loss, ACCURACY: found.counts["figures"]["heldout_accuracy"]}


def _last_loss(folder: Path, steps: int) -> float:
    """The mean loss of the last steps of the cell's training."""
    (path,) = folder.glob("*/history.json")
    (history,) = json.loads(path.read_text()).values()
    last: list[float] = [entry["loss"] for entry in history[-steps:]]
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


class Watch:
    """Says in the driver what becomes of each trial, marks what has no result, and gives back what a stopped trial still holds."""

    def __init__(self, plan: SweepPlan):
        self._plan = plan

    def started(self, parameters: Mapping[str, Any]) -> None:
        """One line."""
        say(f"{self._name(parameters)}: started")

    def again(self, parameters: Mapping[str, Any]) -> None:
        """One line; what the trial held is free for its next try."""
        self.release(self._folder(parameters))
        say(f"{self._name(parameters)}: failed, starting again from its last state")

    def failed(self, parameters: Mapping[str, Any], reason: str) -> None:
        """The reason stands beside the cell, on the screen and in MLflow."""
        self.release(self._folder(parameters))
        mark(self._folder(parameters), "failed", reason)
        self._end_run(parameters, "FAILED")
        say(f"{self._name(parameters)}: failed: {reason}")

    def ended(self, parameters: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """The cell's accuracy, or why it has none."""
        folder = self._folder(parameters)
        self.release(folder)
        status, reason = status_of(self._plan, cell_of(self._plan, parameters))
        if status == "missing":
            # Neither a result nor a reason: the scheduler stopped it.
            status = "stopped"
            reason = f"stopped at {result.get(TIME, 0)} % of its training with loss {result.get(LOSS, math.nan):.4f}"
            mark(folder, status, reason)
            self._end_run(parameters, "KILLED")
        accuracy = f"held-out accuracy {result[ACCURACY]:.3f}" if status == "done" and ACCURACY in result else reason
        say(f"{self._name(parameters)}: {status}, {accuracy}")

    def release(self, folder: Path) -> None:
        """Remove the placement groups that trained under the folder."""
        if folder.exists():
            release_placement_groups(folder)

    def _folder(self, parameters: Mapping[str, Any]) -> Path:
        return self._plan.cell_folder(cell_of(self._plan, parameters))

    def _name(self, parameters: Mapping[str, Any]) -> str:
        return self._plan.name(cell_of(self._plan, parameters))

    def _end_run(self, parameters: Mapping[str, Any], status: str) -> None:
        with contextlib.suppress(OSError, KeyError, json.JSONDecodeError):
            known = json.loads((self._folder(parameters) / RUN_FILE).read_text())
            outbox = outbox_of(self._plan.run(cell_of(self._plan, parameters)))
            # Not the address in the file: the folder may have been moved since.
            StageRun(self._plan.mlflow_uri, known["mlflow_run_id"], outbox).end(status)
