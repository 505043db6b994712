"""Ray Train V2 around a worker function that takes one picklable task and returns one value on rank 0."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayActorError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.util.placement_group import get_current_placement_group

from sarm.data.store.checkpoints import Checkpoints
from sarm.engine.failures import mistake_in
from sarm.engine.mlflow.tracking import close_outboxes
from sarm.engine.ray.cluster import room_for
from sarm.engine.ray.interfaces import TorchOverNodeAddresses
from sarm.engine.ray.placement import note_placement_group
from sarm.engine.ray.room import Cluster
from sarm.engine.ray.stall import who_stood_still
from sarm.engine.stopping import leave_if_asked, saving
from sarm.engine.terminal import say
from sarm.settings.checks import StalledError, StoppedError
from sarm.settings.run import RunSettings

_FEW_WORKERS = 16
_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
# Of a group of workers, each given 60 s by Ray Train.
_STARTS = 4
_SAVES = (
    "the training saves its state first, which takes up to ten steps and the writing of it (Ctrl-C again ends at once)"
)


class _Here(NamedTuple):
    """What a worker is told about the group that it is in."""

    storage: Path
    is_watched: bool


_here: ContextVar[_Here] = ContextVar("_here")


class _Stopped(NamedTuple):
    """What a worker returns that was asked to stop."""

    reason: str


class _WorkersFailed(Exception):  # noqa: N818
    """What one of them raised, and who stood still before."""

    def __init__(self, cause: Exception, stood_still: str):
        super().__init__(str(cause))
        self.cause, self.stood_still = cause, stood_still


class Task(Protocol):
    """What workers are given; picklable. Fields of its own say what they do; these say how."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def run(self) -> RunSettings:
        """How many workers, with how many cores, and how often they are started again."""

    @property
    def folder(self) -> Path:
        """Where they write; Ray Train's own files lie in it for as long as they run."""

    @property
    def states(self) -> Checkpoints | None:
        """Where their states are saved; None: they cannot go on."""


def run_workers(worker: Callable[[Any], Any], task: Task, cluster: Cluster, callbacks: Sequence[Any] = ()) -> Any:
    """Run `worker(task)` on the run's number of Ray Train workers in one process group and return what rank 0 returned.

    With states, the worker goes on from the newest of them: when a worker's process or machine dies, all are started again, up
    to `run.max_restarts` times without a newer state; and on SIGTERM or Ctrl-C they save and stop. Raises UserError if they do not fit
    the cluster, StoppedError if they were stopped, StalledError if a worker stood still too often (`StallGuard`), TimeoutError if the
    cluster has no room for them for minutes, and else what the worker raised, without Ray's wrapping.
    """
    run, name, states = task.run, task.name, task.states
    cluster = room_for(cluster, run, run.num_workers)
    num_workers = cluster.workers(run, run.num_workers)
    threads = cluster.cpus_each(run, num_workers)
    # Ray Train would log every printed line a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # A process of its own watches for the notice that a node will be taken away. A single machine does not need it.
    os.environ.setdefault(_WATCHER, str(int(cluster.num_nodes > 1)))
    if num_workers <= _FEW_WORKERS:
        # How often the controller checks its workers. Few workers can be checked often, so that a death or an end is seen sooner.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    restarts, newest = 0, -1
    while True:
        try:
            with _saving_when_asked(states):
                result = _fit(
                    worker=worker,
                    task=task,
                    cluster=cluster,
                    num_workers=num_workers,
                    threads=threads,
                    callbacks=callbacks,
                )
        except _WorkersFailed as failed:
            # A job that was asked to stop does not start workers again.
            leave_if_asked()
            has_died = _has_died(failed.cause)
            is_stalled = has_died and bool(failed.stood_still)
            cause = StalledError(f"{name}: {failed.stood_still}") if is_stalled else failed.cause
            if states is None or not has_died:
                raise cause from failed.__cause__
            restarts = restarts + 1 if states.newest_step() <= newest else 1
            newest = max(newest, states.newest_step())
            if restarts > run.max_restarts:
                raise cause from failed.__cause__
            what = failed.stood_still or "a worker died"
            say(f"{name}: {what}, starting again from step {max(newest, 0)}")
            continue
        if isinstance(result, _Stopped):
            raise StoppedError(result.reason)
        return result


def _fit(
    worker: Callable[[Any], Any], task: Task, cluster: Cluster, num_workers: int, threads: int, callbacks: Sequence[Any]
) -> Any:
    storage = task.folder / ".ray_train"
    call = {
        "worker": worker,
        "task": task,
        "threads": threads,
        "here": _Here(storage, is_watched=os.environ[_WATCHER] != "0"),
    }
    trainer = _Trainer(
        _call,
        # Bytes: Ray Train's controller unpickles the config too, and what the worker's module imports takes seconds.
        train_loop_config={"call": ray.cloudpickle.dumps(call)},
        torch_config=TorchOverNodeAddresses(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": threads, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        # The same name would continue an older experiment's state.
        run_config=ray.train.RunConfig(
            name=f"{task.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage),
            callbacks=list(callbacks),
            # Without a limit, Ray Train would wait for ever for a cluster that has become too small.
            failure_config=ray.train.FailureConfig(controller_failure_limit=_STARTS - 1),  # type: ignore[call-arg]  # V2 has it
        ),
    )
    try:
        result: Any = trainer.fit()
        return result.return_value
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise TimeoutError(_no_room(task.name, num_workers, threads, cluster)) from error
        if (mistake := mistake_in(error.controller_failure)) is not None:
            raise mistake from error
        raise
    except ray.train.WorkerGroupError as error:
        raise _WorkersFailed(_cause(error), who_stood_still(storage)) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _no_room(name: str, num_workers: int, threads: int, cluster: Cluster) -> str:
    wanted = f"{threads} CPUs and a GPU" if cluster.use_gpu else f"{threads} CPUs"
    there = ray.available_resources()
    return (
        f"{name}: no room for {num_workers} workers of {wanted} each: the cluster has {there.get('CPU', 0):g} CPUs and "
        f"{there.get('GPU', 0):g} GPUs free on {len([n for n in ray.nodes() if n['Alive']])} nodes. Free some, or pass "
        f"--num-workers; where nodes take minutes to start, set {WORKER_GROUP_START_TIMEOUT_S_ENV_VAR} (60, {_STARTS} times)."
    )


def _call(packed: dict[str, bytes]) -> Any:
    config = ray.cloudpickle.loads(packed["call"])
    torch.set_num_threads(config["threads"])
    _here.set(config["here"])
    if (group := get_current_placement_group()) is not None:
        note_placement_group(config["here"].storage, group.id.hex())
    if not torch.cuda.is_available():
        # Before anything imports deepspeed, which looks for accelerators on import.
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        return config["worker"](config["task"])
    except StoppedError as stopped:
        return _Stopped(str(stopped))
    finally:
        close_outboxes()


class _Trainer(ray.train.torch.TorchTrainer):
    """Ray Train's, which leaves Ctrl-C to the job: its own handler ends the workers before they have saved, with status 1.

    Workers read their rows themselves, so that nothing is served by Ray Train's own actor for data sets: it would load Ray Data.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # V2 has it
        return [one for one in made if not isinstance(one, DatasetsCallback)]


@contextlib.contextmanager
def _saving_when_asked(states: Checkpoints | None) -> Iterator[None]:
    """While the body runs, a signal to stop asks the workers to save first."""
    if states is None:
        yield
        return
    states.withdraw_stop()
    try:
        with saving(states.request_stop, _SAVES):
            yield
    finally:
        states.withdraw_stop()


def _cause(error: ray.train.WorkerGroupError) -> Exception:
    """The error that one worker raised. Broken connections of the other workers count only if there is no other error."""
    failures = list(error.worker_failures.values())
    return next((failure for failure in failures if not _has_died(failure)), failures[0])


def _has_died(failure: Exception) -> bool:
    """Whether a worker's process or machine is gone, or this one lost the connection to it."""
    if isinstance(failure, RayActorError | WorkerHealthCheckFailedError | torch.distributed.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(failure, RuntimeError) and any(word in str(failure) for word in words)


def worker_device() -> torch.device:
    """The device that Ray Train gave this worker."""
    return ray.train.torch.get_device()


def worker_storage() -> Path:
    """A folder for what only the process that started this worker reads; it is removed when all workers have ended."""
    return _here.get().storage


def preemption_notice() -> str:
    """Why these workers must end soon, namely that some of their machines are being taken away; '' if none is. All workers call it together."""
    info = ray.train.get_preemption_info() if _here.get().is_watched else None
    if info is None:
        return ""
    names = ", ".join(node[:8] for node in info.preempted_node_ids)
    return f"{len(info.preempted_node_ids)} of its nodes ({names}) will be taken away"


def workers_on_device(device: torch.device) -> int:
    """How many workers share this one's device: all of the machine where it is the CPU."""
    return 1 if device.type == "cuda" else ray.train.get_context().get_local_world_size()
