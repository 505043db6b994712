"""Jobs through `ray job submit`, from a working directory, on a cluster started for it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, outside the range that Ray gives to its workers."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the jobs server of a one-node cluster, ended by its process group."""
    gcs, dashboard, agent, grpc_agent, client = free_ports(5)
    log = tmp_path_factory.mktemp("ray") / "head.log"
    command = [
        RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=4", f"--port={gcs}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc_agent}",
        f"--ray-client-server-port={client}", "--object-store-memory=200000000", f"--temp-dir=/tmp/sarm-ray-{os.getpid()}",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with log.open("w") as out:
        head = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + 90
        while not ready(address, environment):
            assert head.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(1)
        yield address
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


def ready(address: str, environment: dict[str, str]) -> bool:
    """Whether the jobs server answers."""
    asked = subprocess.run(
        [RAY, "job", "list", "--address", address], capture_output=True, env=environment, timeout=60, check=False
    )
    return asked.returncode == 0


def submit(cluster: str, *command: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as the README writes it, with this Python."""
    line = [
        RAY,
        "job",
        "submit",
        "--address",
        cluster,
        "--working-dir",
        ".",
        "--runtime-env",
        "cluster/runtime_env.yaml",
    ]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(
        [*line, "--", *command], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=280, check=False
    )


def test_driver_and_workers_import_the_package_that_travelled(cluster: str, tmp_path: Path) -> None:
    script = tmp_path / "where.py"
    script.write_text(
        "import ray, sarm\n"
        "ray.init()\n"
        "print('at', sarm.__file__, ray.get(ray.remote(lambda: __import__('sarm').__file__).remote()))\n"
    )
    done = submit(cluster, sys.executable, str(script))
    assert done.returncode == 0, done.stdout[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("at ")]
    assert line.count("working_dir_files") == 2, line


def test_a_submitted_job_trains_on_the_cluster(cluster: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "submitted"
    shutil.copytree(finished, out)
    for stage in ("sarm", "evaluation"):
        shutil.rmtree(out / stage)
    done = submit(
        cluster, sys.executable, "jobs/train_sarm.py", "tiny", "--out", str(out), "--cpus-per-worker", "1",
        "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    weights = "model.safetensors"
    alone, submitted = (load_file(folder / "sarm" / weights) for folder in (finished, out))
    assert alone.keys() == submitted.keys()
    assert all(torch.equal(alone[name], submitted[name]) for name in alone), "the same seed, the same weights"
