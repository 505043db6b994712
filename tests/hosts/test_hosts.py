"""The tiny pipeline on four hosts with a cluster token, submitted as a job, with MLflow on the network; then one host is cut off.

Minutes: part of `make test-chaos` alone.
"""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.hosts.namespaces import Hosts, token, why_not

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = [
    pytest.mark.skipif(not os.environ.get("SARM_CHAOS"), reason="minutes: `make test-chaos`"),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]
HOSTS, HEAD, GCS, DASHBOARD, MLFLOW = 4, 1, 6399, 8265, 5000
_HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 3,
}
SECONDS = 600
TRAINING = ("--reward.epochs", "6", "--reward.checkpoint-every-steps", "4")


class Cluster:
    """Ray on all hosts, MLflow on the first."""

    def __init__(self, root: Path):
        self.root, self._temporary = root, Path(f"/tmp/sarm-hosts-{os.getpid()}")
        self.hosts = Hosts(HOSTS, self._temporary, root)
        known = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**known, **token(root), "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}

    @property
    def mlflow_uri(self) -> str:
        return f"http://{self.hosts.address(HEAD)}:{MLFLOW}"

    def open(self) -> None:
        self.hosts.open()
        common = ["--block", "--num-cpus=1", "--object-store-memory=100000000"]
        head = [
            "start", "--head", f"--node-ip-address={self.hosts.address(HEAD)}", f"--port={GCS}", f"--dashboard-port={DASHBOARD}",
            f"--temp-dir={self._temporary}", f"--system-config={json.dumps(_HEALTH)}", *common,
        ]  # fmt: skip
        self._start(HEAD, "ray-1", str(BIN / "ray"), *head)
        self.wait_for(lambda: self.job("list").returncode == 0, "the head's jobs server")
        # One after the other: on two cores they would time out together.
        for host in range(2, HOSTS + 1):
            address = f"--node-ip-address={self.hosts.address(host)}"
            join = ["start", f"--address={self.hosts.address(HEAD)}:{GCS}", address, *common]
            self._start(host, f"ray-{host}", str(BIN / "ray"), *join)
            self.wait_for(lambda host=host: self.num_nodes() == host, f"node {host}")
        self.start_mlflow()

    def num_nodes(self) -> int:
        line = [str(BIN / "ray"), "status", "--address", f"{self.hosts.address(HEAD)}:{GCS}"]
        asked = subprocess.run(
            self.hosts.command(HEAD, *line), capture_output=True, text=True, check=False, env=self.environment
        )
        return len(re.findall(r"^ 1 node_", asked.stdout, flags=re.MULTILINE))

    def start_mlflow(self) -> None:
        self.mlflow = self._start(
            HEAD, "mlflow", str(BIN / "mlflow"), "server", "--backend-store-uri", f"sqlite:///{self.root / 'mlflow.db'}",
            "--artifacts-destination", str(self.root / "artifacts"), "--host", self.hosts.address(HEAD), "--port", str(MLFLOW),
            "--workers", "1", "--allowed-hosts", f"{self.hosts.address(HEAD)}:{MLFLOW}",
        )  # fmt: skip
        asked = ["curl", "--silent", "--fail", "--max-time", "2", f"{self.mlflow_uri}/health"]
        self.wait_for(
            lambda: subprocess.run(self.hosts.command(HEAD, *asked), capture_output=True, check=False).returncode == 0,
            "MLflow",
        )

    def _start(self, host: int, name: str, *command: str) -> subprocess.Popen[bytes]:
        return self.hosts.start(host, command, (self.root / f"{name}.log").open("ab"), self.environment)

    def job(self, *command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job ...` on the first host, whose dashboard listens on loopback."""
        line = [str(BIN / "ray"), "job", command[0], "--address", f"http://127.0.0.1:{DASHBOARD}", *command[1:]]
        return subprocess.run(
            self.hosts.command(HEAD, *line), cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False,
            env=environment or self.environment,
        )  # fmt: skip

    def submit(self, *command: str) -> subprocess.Popen[str]:
        line = [
            str(BIN / "ray"), "job", "submit", "--address", f"http://127.0.0.1:{DASHBOARD}", "--working-dir", ".", "--runtime-env",
            "cluster/runtime_env.yaml", "--", "python", *command, "--mlflow-uri", self.mlflow_uri, "--num-workers", "2",
            "--num-actors", "2", "--cpus-per-worker", "1",
        ]  # fmt: skip
        return subprocess.Popen(
            self.hosts.command(HEAD, *line), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=self.environment,
        )  # fmt: skip

    def wait_for(self, is_there: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not is_there():
            assert time.monotonic() < deadline, f"no {what}: {self.said()}"
            time.sleep(1)

    def said(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in sorted(self.root.glob("*.log")))

    def steps(self, metric: str) -> list[int]:
        """Steps of a metric in the newest run that has it, as the server stored them."""
        with sqlite3.connect(self.root / "mlflow.db") as store:
            rows = store.execute("select step from metrics where key = ? order by step", (metric,)).fetchall()
        return [step for (step,) in rows]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("hosts"))
    try:
        found.open()
        yield found
    finally:
        found.hosts.close()


@pytest.fixture(scope="module")
def undisturbed(cluster) -> tuple[Path, str]:
    """The output folder and the log of a pipeline that nobody disturbed."""
    out = cluster.root / "undisturbed"
    job = cluster.submit("jobs/pipeline.py", "tiny", "--out", str(out), "--reward.zero-stage", "3", *TRAINING)
    said, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, said[-4000:]
    return out, said


def test_the_pipeline_runs_over_hosts_and_logs_over_the_network(cluster, undisturbed):
    out, said = undisturbed
    assert (out / "report.html").exists()
    groups = re.findall(r"- \(ip=(\S+), pid=\d+\) world_rank=(\d), local_rank=(\d), node_rank=(\d)", said)
    assert {rank for _, rank, _, _ in groups} == {"0", "1"}
    assert {local for _, _, local, _ in groups} == {"0"}, "the two workers are never on one host"
    assert len({ip for ip, *_ in groups}) >= 2
    steps = cluster.steps("sarm/loss")
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 20


def test_without_the_token_nothing_is_to_be_had(cluster):
    bare = {k: v for k, v in cluster.environment.items() if k != "RAY_AUTH_TOKEN_PATH"}
    bare |= {"RAY_AUTH_MODE": "disabled", "HOME": str(cluster.root)}
    refused = cluster.job("list", environment=bare)
    assert refused.returncode != 0
    assert "401" in refused.stdout + refused.stderr or "Unauthorized" in refused.stdout + refused.stderr


def test_a_host_that_is_cut_off_and_an_mlflow_that_goes_away_change_no_bit(cluster, undisturbed):
    """The training goes on from its last state on the hosts that are left; the loss of every step is in MLflow once."""
    done, _ = undisturbed
    out = cluster.root / "disturbed"
    out.mkdir()
    for name in ("corpus", "pairs", "activations", "sae"):
        shutil.copytree(done / name, out / name)
    before = len(cluster.steps("sarm/loss"))
    job = cluster.submit("jobs/train_sarm.py", "tiny", "--out", str(out), "--reward.zero-stage", "3", *TRAINING)
    states = out / "training" / "sarm"
    cluster.wait_for(lambda: len(list(states.glob("step-*"))) >= 1 or job.poll() is not None, "state of the training")
    assert job.poll() is None, job.communicate()[0][-4000:]
    cluster.mlflow.kill()
    on = next(
        host for host in range(2, HOSTS + 1)
        if any("RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_text() for pid in cluster.hosts.pids(host) if Path(f"/proc/{pid}").exists())
    )  # fmt: skip
    with cluster.hosts.cut_off(on):
        time.sleep(15)
    cluster.start_mlflow()
    said, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, said[-4000:]
    assert "starting again from step" in said
    for name, weight in load_file(done / "sarm" / "model.safetensors").items():
        assert torch.equal(load_file(out / "sarm" / "model.safetensors")[name], weight), name
    losses = [json.loads((folder / "sarm" / "history.json").read_text())["sarm"] for folder in (done, out)]
    assert [entry["loss"] for entry in losses[0]] == [entry["loss"] for entry in losses[1]]
    assert len(cluster.steps("sarm/loss")) == 2 * before, "no point lost, none twice"
