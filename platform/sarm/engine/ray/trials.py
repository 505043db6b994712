"""Runs trials through Ray Tune. The caller provides the trial's function, its parameters and an object that watches."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from sarm.settings.checks import StoppedError
from sarm.settings.sweep import SweepSettings

# A trial only waits for its workers, so it must not take cores from them.
_TRIAL_CPUS = 0.01
TIME, LOSS, ACCURACY = "percent", "loss", "heldout_accuracy"
"""What trials report: how much of their training is done, its loss, and at the end the held-out accuracy."""

Trial = Callable[..., dict[str, Any]]


class Watch(Protocol):
    """Is told, in the driver, what happens to each trial. The parameters identify the trial."""

    def started(self, parameters: Mapping[str, Any]) -> None:
        """The trial begins."""

    def again(self, parameters: Mapping[str, Any]) -> None:
        """The trial failed, and is started again."""

    def failed(self, parameters: Mapping[str, Any], reason: str) -> None:
        """The trial failed for good."""

    def ended(self, parameters: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """The trial came to its end, or was stopped by the scheduler; `result` is what it reported last."""


def run_trials(
    trial: Trial,
    arguments: Mapping[str, Any],
    sweep: SweepSettings,
    watch: Watch,
    *,
    space: dict[str, Any],
    num_samples: int,
    at_once: int,
    seed: int,
    storage: Path,
) -> None:
    """Run `trial(parameters, **arguments)` over a space. Raises StoppedError if SIGTERM ends it; `storage` is left empty."""
    shutil.rmtree(storage, ignore_errors=True)
    # Reports during training have no held-out accuracy yet, which Optuna is told at the end.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # Ray Tune would answer Ctrl-C itself, and go on with what comes after the trials.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Ray Tune's tables name trials by ids; the watch's lines name the cells.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, **arguments), {"CPU": _TRIAL_CPUS}),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=_searcher(sweep, seed),
            scheduler=scheduler_of(sweep),
            num_samples=num_samples,
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=sweep.retries),
            callbacks=[_Callback(watch)],
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
        shutil.rmtree(storage, ignore_errors=True)


def each_of(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """A space of one parameter that takes every value once."""
    return {name: tune.grid_search(list(values))}


def choices(axes: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """A space that a searcher proposes values of."""
    return {name: tune.choice(list(values)) for name, values in axes.items()}


def training_reports() -> tuple[Any, ...]:
    """Callbacks of Ray Train that hand a training's reports on to its trial."""
    return (TuneReportCallback(),)


def scheduler_of(sweep: SweepSettings) -> Any:
    """Every trial to its end, or the worse ones stopped early by their loss."""
    if sweep.search != "asha":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr=TIME,
        metric=LOSS,
        mode="min",
        max_t=100,
        grace_period=sweep.grace_percent,
        reduction_factor=sweep.reduction_factor,
        # A trial that has trained to the end must still be evaluated.
        stop_last_trials=False,
    )


def _searcher(sweep: SweepSettings, seed: int) -> Any:
    if sweep.search != "optuna":
        return None
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(metric=ACCURACY, mode="max", seed=seed)


class _Callback(tune.Callback):
    def __init__(self, watch: Watch):
        self._watch = watch

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watch.started(trial.config)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watch.again(trial.config)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watch.failed(trial.config, _reason(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._watch.ended(trial.config, trial.last_result or {})


def _reason(trial: Any) -> str:
    """The last line of what the trial died of."""
    try:
        lines = Path(trial.error_file).read_text().strip().splitlines()
    except (OSError, TypeError):
        return "no reason given"
    return next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
