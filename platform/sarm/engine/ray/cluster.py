"""Joining or starting a Ray cluster, and looking at its nodes.

Functions that need Ray import it themselves, so that a refusal does not wait for the import.
"""

import contextlib
import logging
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sarm.engine.failures import causes_of
from sarm.engine.ray.room import Cluster, Node, with_room
from sarm.engine.ray.temporary import short_folder, token_without_home
from sarm.engine.ray.worker_lines import show_plainly
from sarm.engine.stopping import STARTED_AGAIN, ray_starting, was_asked
from sarm.settings.checks import NO_PROGRESS_SECONDS, UserError
from sarm.settings.run import RunSettings

# Light tasks (reading, writing, controllers) must find a slot while workers hold the cores, or the pipeline starves.
_SPARE_SLOTS = 2
_LOCAL_OBJECT_STORE = 1024**3
_SECONDS_BETWEEN_TRIES = 2.0
PATIENCE = {"agent_register_timeout_ms": 300_000, "worker_register_timeout_seconds": 180}
"""Settings of Ray. On a busy machine Python needs longer to import Ray than Ray waits: by default a node ends when its agent has not spoken
after 30 s, and kills workers that have not after 60 s, again and again."""
# A node may have to unpack the working directory first.
_SECONDS_OF_A_LOOK = 120.0
# With these set, Ray Data runs code out of Parquet files (CVE-2026-41486).
_UNSAFE_VARIABLES = (
    "RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA",
    "RAY_DATA_AUTOLOAD_PICKLE_OBJECT_SCALAR",
    "RAY_DATA_AUTOLOAD_PYEXTENSIONTYPE",
)


@contextmanager
def connect(run: RunSettings) -> Iterator[Cluster]:
    """The cluster of `run.ray_address`, else of the submitted job, else one started here and stopped at the end."""
    if unsafe := [name for name in _UNSAFE_VARIABLES if os.environ.get(name)]:
        raise UserError(f"{unsafe[0]} is set, which lets Parquet files run code. Unset it.")
    import ray

    address = address_of(run)
    if ray.is_initialized():
        yield cluster_now(run, is_local=False)
        return
    with contextlib.ExitStack() as machine:
        with ray_starting():
            if address == "local":
                machine.enter_context(token_without_home())
                _start(machine.enter_context(short_folder()))
            else:
                _join(address)
        try:
            yield cluster_now(run, is_local=address == "local")
        finally:
            ray.shutdown()


def _start(folder: str | None) -> None:
    """A cluster of this machine alone, with its sockets and logs in `folder` where one is given."""
    import ray

    ray.init(
        address="local",
        num_cpus=_cores() + _SPARE_SLOTS,
        object_store_memory=_LOCAL_OBJECT_STORE,
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": prepare_worker},
        # Ray's default of 15 would let every other process here come first, and a torch operation waits for its slowest thread.
        _system_config={"worker_niceness": 0, **PATIENCE},
        _temp_dir=folder,
        logging_level=logging.WARNING,
    )
    show_plainly()


def _join(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} is the address of a dashboard, to which jobs are submitted; no job joins a cluster there. Pass --submit {address}, or unset RAY_ADDRESS for a local cluster."
        )
    import ray

    # A supervised job that is started again has had a cluster at this address. A head that was lost may come back.
    last = time.monotonic() + (NO_PROGRESS_SECONDS if os.environ.get(STARTED_AGAIN) else 0.0)
    while True:
        try:
            check_listening(address)
            with _compiled_part_silent():
                # Ray Train's clean-up finds the cluster by this name. Without it, it could not choose between several clusters on one machine.
                named = {"env_vars": {"RAY_ADDRESS": address}} if ":" in address else None
                ray.init(address=address, runtime_env=named, logging_level=logging.WARNING)
            return
        except ConnectionError as error:
            if reason := next(filter(None, map(why_refused, causes_of(error))), ""):
                raise UserError(f"the Ray cluster at {address} {reason}") from error
            if time.monotonic() >= last:
                reason = " ".join(str(error).split())[:300].rstrip(".")
                raise UserError(
                    f"no Ray cluster at {address}: {reason}. Pass --ray-address, or leave it out for a local one."
                ) from error
        except (ray.exceptions.AuthenticationError, RuntimeError) as error:
            if reason := why_refused(error):
                raise UserError(f"the Ray cluster at {address} {reason}") from error
            raise
        time.sleep(_SECONDS_BETWEEN_TRIES)


@contextmanager
def _compiled_part_silent() -> Iterator[None]:
    """While the body runs, nothing goes to the process's stderr. Ray prints lines there before it raises the error of a cluster that refuses."""
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        if not was_asked():
            os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)


def check_listening(address: str) -> None:
    """Raise ConnectionError if nobody listens at HOST:PORT: Ray would try for a minute and more."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from error


def why_refused(error: BaseException) -> str:
    """Why a cluster that answers refuses this process, and what to do; '' if the error does not say."""
    said = str(error)
    if type(error).__name__ == "AuthenticationError" or "AuthenticationError" in said:
        return "does not accept the token of this process. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token."
    if "Version mismatch" in said:
        versions = re.findall(r"^\s*(Ray|Python): (\S+)", said, flags=re.M)
        theirs, ours = (", ".join(" ".join(pair) for pair in pairs) for pairs in (versions[:2], versions[2:]))
        return f"runs {theirs}, and this process {ours}. Use an environment with the cluster's versions."
    return ""


def nodes_without(folder: Path) -> list[str]:
    """Addresses of the cluster's nodes that may work and do not see a file which is written into the folder here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    sees = ray.remote(num_cpus=0)(_sees)
    made = [there for there in (folder, *folder.parents) if not there.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".seen-by-all-{uuid.uuid4().hex}"
    probe.touch()
    try:
        asked = {
            node["NodeManagerAddress"]: sees.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(str(probe))
            for node in ray.nodes()
            if node["Alive"] and does_work(node)
        }
        late = set(ray.wait(list(asked.values()), num_returns=len(asked), timeout=_SECONDS_OF_A_LOOK)[1])
        if names := sorted(address for address, answer in asked.items() if answer in late):
            raise UserError(
                f"{', '.join(names)} did not say within {_SECONDS_OF_A_LOOK:.0f} s whether {folder} is there. Look after these nodes, then run the same command."
            )
        return sorted(address for address, answer in asked.items() if not ray.get(answer))
    finally:
        probe.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # A folder that was made for this check alone.
            for there in made:
                there.rmdir()


def does_work(node: Mapping[str, Any]) -> bool:
    """Whether tasks that need a core or a GPU can run on a node of `ray.nodes()`."""
    return any(node.get("Resources", {}).get(name, 0) > 0 for name in ("CPU", "GPU"))


def _sees(path: str) -> bool:
    return os.path.exists(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def address_of(run: RunSettings) -> str:
    """The cluster that the run joins, `local` if it starts one."""
    return run.ray_address or os.environ.get("RAY_ADDRESS") or "local"


def check_machine(run: RunSettings) -> None:
    """Raise UserError if the run's cluster would be started here and neither workers nor actors would fit it."""
    is_joined = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if address_of(run) == "local" and not is_joined:
        here = Cluster(nodes=(Node(_cores()),), is_local=True)
        here.cpus_each(run, max(1, min(run.num_workers, run.num_actors)))


def prepare_worker() -> None:
    """Say which cluster this is, and hide a warning, twice a second, that no dashboard was started for Ray Train's clean-up to ask."""
    import ray

    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    logging.getLogger("ray.train.v2._internal.execution.controller.placement_group_cleaner").setLevel(logging.ERROR)


def cluster_now(run: RunSettings, *, is_local: bool) -> Cluster:
    """What the nodes that are there give the run's workers."""
    import ray

    spare = _SPARE_SLOTS if is_local else 0
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple(Node(int(node.get("CPU", 0)) - spare, int(node.get("GPU", 0))) for node in found)
    return Cluster(nodes=nodes, is_local=is_local, gpus_wanted=run.use_gpu)


def room_for(cluster: Cluster, run: RunSettings, asked: int) -> Cluster:
    """The cluster as it is once the workers `asked` for fit it (`with_room`). Raises UserError if they do not in time."""
    from ray.autoscaler.sdk import request_resources

    return with_room(
        cluster,
        run,
        asked,
        look=lambda: cluster_now(run, is_local=False),
        ask=lambda bundles: request_resources(bundles=bundles),
    )
