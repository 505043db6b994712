"""Checks of a job's output folder before any work is done: it is kept, all nodes that write see it, and it has room."""

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sarm.contracts.manifest import MANIFEST
from sarm.engine.mlflow.tracking import tracking_uri
from sarm.engine.mlflow.ui_command import ui_command
from sarm.settings.checks import UserError
from sarm.settings.model import ModelSettings
from sarm.settings.results_root import DEFAULT, VARIABLE, is_in_package, results_root, submitted_as
from sarm.settings.run import RunSettings

RESULTS, MLFLOW = "results  ", "mlflow   "
"""How the lines begin that say where they go."""
# Bytes that every job may write: logs, manifests, MLflow's database, a report.
_LEAST = 100_000_000
# Weights, gradients' moments and the copy that is being written beside the one before, in bytes a parameter; and the finished file.
_STATES, _WEIGHTS = 2 * 12, 4


@contextlib.contextmanager
def kept(config: Any, *before: Any) -> Iterator[None]:
    """Run the job's work. A submitted job prints before and after it where its results are.

    A cluster that the job, or one of the jobs `before` it, may use and joins is joined here. Raises UserError if the output folder cannot be written, has too little room, lies
    where Ray deletes it, or is not the same folder on the nodes that do the work, before any of the work is done.
    """
    run = getattr(config, "run", None)
    if run is None:
        yield
        return
    check_place(run)
    check_room(config)
    with contextlib.ExitStack() as stack:
        from sarm.engine.ray.cluster import address_of, connect

        may_use_one = any(getattr(one, "uses_cluster", True) for one in (config, *before))
        if may_use_one and address_of(run) != "local":
            cluster = stack.enter_context(connect(run))
            check_shared(run, cluster.num_nodes)
        if not submitted_as():
            yield
            return
        tell(run)
        try:
            yield
        finally:
            tell(run)


def tell(run: RunSettings) -> None:
    """Print where results are, and how to see them in MLflow."""
    print(f"{RESULTS}{run.out} on {socket.gethostname()}")
    print(f"{MLFLOW}{ui_command(tracking_uri(run))}", flush=True)


def check_place(run: RunSettings) -> None:
    """Raise UserError for an output folder that this machine cannot write, or that Ray will delete."""
    if not Path(os.path.expanduser(os.environ.get(VARIABLE) or "/")).is_absolute():
        raise UserError(
            f"{VARIABLE} must be an absolute folder, got {os.environ[VARIABLE]!r}. Set it to one that lasts."
        )
    if is_in_package(run.out):
        raise UserError(
            f"{run.out} is inside the package that Ray has unpacked, and goes when that goes. Pass --out FOLDER outside it, or set {VARIABLE}."
        )
    there = _nearest(run.out)
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        raise UserError(
            f"{run.out} cannot be made: {there} is not a folder that this user may write to. Pass another --out."
        )


def check_room(config: Any) -> None:
    """Raise UserError if the disk of the output folder has less room than what is known of the job needs."""
    there = _nearest(config.run.out)
    free, wanted = shutil.disk_usage(there).free, least_bytes(config)
    if free < wanted:
        raise UserError(
            f"{there} has {free / 1e9:.2f} GB free, and this job writes at least {wanted / 1e9:.2f} GB to {config.run.out}. Make room, or pass another --out."
        )


def least_bytes(config: Any) -> int:
    """What the job will write at the least, in bytes: its SAE with two training states, where its size is known, and 100 MB for the rest."""
    from sarm.data.formats.model_shapes import shape_of

    sae, model, least = getattr(config, "sae", None), getattr(config, "model", None), _LEAST
    is_done = (config.run.out / "sae" / MANIFEST).exists()
    if sae is not None and isinstance(model, ModelSettings) and not is_done and (shape := shape_of(model)):
        least += (_STATES + _WEIGHTS) * 2 * shape.d_in * sae.d_sae
    return least


def check_shared(run: RunSettings, num_nodes: int) -> None:
    """Raise UserError if a node that does work does not see what this one writes to the output folder, or could come later and not see it.

    The nodes of one machine see it. A probe file is written here and looked for by a task on each node.
    """
    import ray

    from sarm.engine.ray.cluster import does_work, nodes_without

    workers = [node for node in ray.nodes() if node["Alive"] and does_work(node)]
    is_default = not os.environ.get(VARIABLE) and run.out.is_relative_to(results_root() or run.out / "none")
    if is_default and not workers:
        raise UserError(
            f"the nodes that do the work have not started yet, and nothing says that they share {DEFAULT}. Set {VARIABLE} to a folder that all nodes share, or pass --out."
        )
    if num_nodes == 1:
        return
    uri = tracking_uri(run)
    if uri.startswith("sqlite:"):
        raise UserError(
            f"the cluster has {num_nodes} nodes, and {uri} is a file on one of them. Pass --mlflow-uri http://HOST:PORT."
        )
    if blind := nodes_without(run.out):
        raise UserError(
            f"{run.out} is not the same folder on {', '.join(blind)}: results would be scattered. Pass an --out that all nodes share, or set {VARIABLE} to such a folder."
        )


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(there for there in (folder, *folder.parents) if there.exists())
