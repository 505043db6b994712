"""Ray Train V2 around a worker function that takes one picklable task and returns one value on rank 0."""

import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch

from sarm.config import Run
from sarm.runtime.cluster import Cluster
from sarm.runtime.tracking import StageRun

Task = TypeVar("Task")
_PRINT_EVERY_SECONDS = 5.0


def run_workers(
    name: str, worker: Callable[[Any], Any], task: Any, run: Run, folder: Path, cluster: Cluster, threads: int
) -> Any:
    """Run `worker(task)` on `run.num_workers` Ray Train workers in one process group and return what rank 0 returned.

    Raises what the worker raised, without Ray's wrapping.
    """
    # Ray Train would log every printed line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    storage = folder / ".ray_train"
    trainer = ray.train.torch.TorchTrainer(
        _call,
        train_loop_config={"worker": worker, "task": task, "threads": threads},
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": threads, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        # The same name would continue an older experiment's state.
        run_config=ray.train.RunConfig(name=f"{name}-{uuid.uuid4().hex[:8]}", storage_path=str(storage)),
    )
    try:
        result: Any = trainer.fit()
        return result.return_value
    except ray.train.WorkerGroupError as error:
        raise next(iter(error.worker_failures.values())) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _call(config: dict[str, Any]) -> Any:
    torch.set_num_threads(config["threads"])
    if not torch.cuda.is_available():
        # Before anything imports deepspeed, which looks for accelerators on import.
        os.environ["DS_ACCELERATOR"] = "cpu"
    return config["worker"](config["task"])


def worker_device() -> torch.device:
    """The device that Ray Train gave this worker."""
    return ray.train.torch.get_device()


def workers_on_device(device: torch.device) -> int:
    """How many workers share this one's device: all of the machine where it is the CPU."""
    return 1 if device.type == "cuda" else ray.train.get_context().get_local_world_size()


class Progress:
    """Prints a line now and then and logs every step's metrics to MLflow."""

    def __init__(self, name: str, tracking: StageRun, shown: tuple[str, ...]):
        self.history: list[dict[str, float]] = []
        self._name, self._tracking, self._shown = name, tracking, shown
        self._started = self._printed = self._flushed = time.monotonic()

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self._tracking.log_metrics({f"{self._name}/{key}": value for key, value in metrics.items()}, step)
        self.history.append({"step": step, **metrics})
        now, done = time.monotonic(), metrics["progress"]
        if now - self._printed >= _PRINT_EVERY_SECONDS or done >= 1 or step == 1:
            self._printed = now
            left = (now - self._started) * (1 - done) / max(done, 1e-9)
            values = "  ".join(f"{key} {metrics[key]:.4g}" for key in self._shown if key in metrics)
            print(f"{self._name} {done:4.0%}  step {step}  {values}  {left:.0f} s left", flush=True)
