"""How a training tells of its steps: lines on the terminal, metrics in MLflow, reports to Ray Train's callbacks."""

import time
from collections.abc import Mapping, Sequence

import ray.train

from sarm.engine.live.progress_line import training_line
from sarm.engine.mlflow.tracking import StageRun

_PRINT_EVERY_SECONDS = 5.0


def report_progress(every_steps: int, step: int, history: Sequence[Mapping[str, float]]) -> None:
    """Tell Ray Train's callbacks how training goes, every `every_steps` steps; all workers call it together after each step.

    `history` is the first worker's. `loss` is the newest validation's, or the mean over the steps since the last report.
    """
    if not every_steps or step % every_steps:
        return
    if not history:
        ray.train.report({})
        return
    recent = history[-every_steps:]
    measured = [entry["validation_loss"] for entry in history if "validation_loss" in entry]
    loss = measured[-1] if measured else sum(entry["loss"] for entry in recent) / len(recent)
    ray.train.report({"step": step, "percent": round(100 * history[-1]["progress"]), "loss": loss})


class Progress:
    """Prints a line now and then and logs every step's metrics to MLflow, each step once in the run's life."""

    def __init__(self, name: str, tracking: StageRun, shown: tuple[str, ...], behind: str = ""):
        self.history: list[dict[str, float]] = []
        self._name, self._tracking, self._shown = name, tracking, shown
        self._title = f"{name} {behind}".rstrip()
        self._started = self._printed = time.monotonic()
        self._done_before: float | None = None

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        named = {f"{self._name}/{key}": value for key, value in metrics.items()}
        self._tracking.log_metrics(named, step, series=f"{self._name}/progress")
        self.history.append({"step": step, **metrics})
        now, done = time.monotonic(), metrics["progress"]
        is_first = self._done_before is None
        if self._done_before is None:
            self._done_before = done if step > 1 else 0.0
        if now - self._printed >= _PRINT_EVERY_SECONDS or done >= 1 or is_first:
            self._printed = now
            left = (now - self._started) * (1 - done) / max(done - self._done_before, 1e-9)
            values = [f"{key} {metrics[key]:.4g}" for key in self._shown if key in metrics]
            print(
                training_line(self._title, done, step, values, left if done > self._done_before else None), flush=True
            )
