"""Metrics as runs of Weights & Biases, beside MLflow (`--wandb`).

A run there has the id of the MLflow run that it mirrors, so that each process which logs goes on with the same one: a training's worker first,
the job after it. It gets numbers, the settings that MLflow gets as parameters, and nothing else: no code, console, packages or names of machines.
MLflow stays the one that has everything. Where Weights & Biases does not answer, a run is left out there, and that is said.
"""

import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarm.engine.terminal import say
from sarm.settings.checks import UserError
from sarm.settings.extras import need

# Seconds that a run waits for the server at its beginning and its end, and the number of letters of a setting, as in MLflow.
_PATIENCE_SECONDS, _MAX_LENGTH = 30.0, 6000
_OFFLINE = ("offline", "dryrun", "disabled")


@dataclass(frozen=True)
class WandbRun:
    """What a run of Weights & Biases is called, which workers get with the MLflow run."""

    run_id: str
    name: str
    group: str
    project: str
    settings: Mapping[str, Any]
    folder: Path
    """Where the library keeps its files, in a folder `wandb`."""


# The open runs of this process, each with the metrics that have been given their axis; None: it cannot be had.
_runs: dict[str, tuple[Any, set[str]] | None] = {}
_lock = threading.Lock()


def check() -> None:
    """Raise MissingExtraError if the library is missing, UserError if metrics are to be sent and nobody is logged in; sends nothing."""
    need("wandb")
    wandb = _library()
    try:
        is_ready = wandb.setup().settings.mode in _OFFLINE or wandb.login(prompt=False, verify=False)
    except Exception as error:
        # Pydantic's of a WANDB_ variable, the library's own of a key's form: whatever it is, the run could not be had later.
        raise UserError(f"--wandb: Weights & Biases cannot be used: {' '.join(str(error).split())[:200]}") from error
    if not is_ready:
        raise UserError(
            "--wandb: nobody is logged in to Weights & Biases. Run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline and upload later."
        )


def log(run: WandbRun, metrics: Mapping[str, float], step: int, series: str | None) -> None:
    """Add numbers at a step. Those of a series have an axis of their own, on which steps that the server has already are left out."""
    axis = f"{series.rpartition('/')[0]}/step" if series else "step"
    with _lock:
        if not metrics or (opened := _opened(run)) is None:
            return
        there, known = opened
        try:
            # What an earlier process sent of a training that goes on from a state; runs without a server cannot know.
            if series and there.resumed and step <= (there.summary.get(axis) or 0):
                return
            for name in metrics.keys() - known:
                there.define_metric(name, step_metric=axis)
                known.add(name)
            there.log({**metrics, axis: step})
        except Exception as error:
            # Of the library's service or of the network: no reason to stop a training.
            _give_up(run.run_id, error)


def end(run: WandbRun, *, failed: bool) -> None:
    """Close a run. One that failed is marked so, even if this process logged nothing to it."""
    with _lock:
        if failed:
            _opened(run)
        _finish(run.run_id, failed=failed)


def close_all() -> None:
    """Close the runs of this process; another may go on with them."""
    with _lock:
        for run_id in list(_runs):
            _finish(run_id, failed=False)


def _library() -> Any:
    # Its own failures go to its makers unless they are told not to.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    return wandb


def _opened(run: WandbRun) -> tuple[Any, set[str]] | None:
    if run.run_id not in _runs:
        wandb = _library()
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            there = wandb.init(
                project=run.project,
                id=run.run_id,
                name=run.name,
                group=run.group,
                config={key: _setting(value) for key, value in run.settings.items()},
                dir=str(run.folder),
                resume="allow",
                # Beside runs that somebody's own program has open.
                reinit="create_new",
                settings=wandb.Settings(**_quiet()),
            )
            _runs[run.run_id] = (there, set())
        except Exception as error:
            _give_up(run.run_id, error)
    return _runs[run.run_id]


def _quiet() -> dict[str, Any]:
    """The library's settings that keep to itself what MLflow is not told, and its voice low."""
    return {
        "console": "off",
        "silent": True,
        "disable_code": True,
        "disable_git": True,
        "disable_job_creation": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "host": "",
        "init_timeout": _PATIENCE_SECONDS,
        "finish_timeout": _PATIENCE_SECONDS,
    }


def _setting(value: Any) -> Any:
    is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return value if value is None or is_number else str(value)[:_MAX_LENGTH]


def _finish(run_id: str, *, failed: bool) -> None:
    if (opened := _runs.pop(run_id, None)) is not None:
        try:
            opened[0].finish(exit_code=int(failed))
        except Exception as error:
            _say(error)


def _give_up(run_id: str, error: Exception) -> None:
    _runs[run_id] = None
    _say(error)


def _say(error: Exception) -> None:
    say(f"Weights & Biases does not take this run's metrics ({' '.join(str(error).split())[:120]}): MLflow has them")
