"""A training on three nodes of which one is announced to be taken away: it saves, exits 75, and goes on without that node."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tests.chaos.trainings import copy_up_to_training, train_sarm
from tests.engine.mlflow_server import MlflowServer

_NODE = {"num_cpus": 1, "object_store_memory": 100_000_000, "include_dashboard": False}


@pytest.mark.skipif("SARM_CHAOS" not in os.environ, reason="takes minutes: make test-chaos")
@pytest.mark.usefixtures("private_cluster")
def test_a_training_whose_node_will_be_taken_away_saves_and_goes_on_elsewhere(finished: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET
    from ray.cluster_utils import Cluster

    out, mlflow = tmp_path / "out", MlflowServer(tmp_path)
    copy_up_to_training(finished, out)
    shutil.rmtree(out / "scalar_head")
    nodes = Cluster(initialize_head=True, connect=False, head_node_args=_NODE)
    try:
        workers = [nodes.add_node(**_NODE) for _ in range(2)]
        # Nothing saves but the notice.
        options = ("--reward.epochs", "100", "--reward.checkpoint-every-steps", "10000", "--reward.baselines")
        options += ("--ray-address", nodes.address, "--cpus-per-worker", "1")
        command = train_sarm(out, mlflow.uri, *options)
        job = subprocess.Popen(
            [*command, "--num-workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said = ""
        assert job.stdout is not None
        while not re.search(r"step \d{2,}", said):
            said += (line := job.stdout.readline())
            assert line, said
        # Two workers on three nodes of one core: at least one is not on the head.
        node = next(
            node for node in workers
            if any(
                "RayTrainWorker" in " ".join(child.cmdline())
                for child in psutil.Process(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid).children(recursive=True)
            )
        )  # fmt: skip
        drain = [
            str(Path(sys.executable).parent / "ray"), "drain-node", "--address", nodes.address, "--node-id", node.node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "120",
        ]  # fmt: skip
        subprocess.run(drain, check=True, capture_output=True, timeout=60)
        noticed = time.monotonic()
        said += job.communicate(timeout=100)[0]
        assert job.returncode == 75, said[-3000:]
        assert time.monotonic() - noticed < 60
        (step,) = re.findall(
            rf"stopped after step (\d+): 1 of its nodes \({node.node_id[:8]}\) will be taken away", said
        )
        nodes.remove_node(node)
        again = subprocess.run(
            [*command, "--num-workers", "1"], capture_output=True, text=True, check=False, timeout=400
        )
        assert again.returncode == 0, (again.stdout + again.stderr)[-3000:]
        assert f"sarm goes on after step {step}" in again.stdout + again.stderr
    finally:
        nodes.shutdown()
        mlflow.kill()
