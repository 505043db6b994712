"""The cluster's head is killed under a training: the job ends instead of waiting for it, and goes on when there is a head again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.test_submit import free_ports

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
_SECONDS = 400


class Head:
    """A cluster of one node, at the same address every time that it is started."""

    def __init__(self, root: Path):
        self._log, self._temporary = root / "head.log", Path(f"/tmp/sarm-head-{os.getpid()}")
        gcs, *others = free_ports(4)
        self.address = f"127.0.0.1:{gcs}"
        names = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port")
        ports = [f"--{name}={port}" for name, port in zip(names, others, strict=True)]
        self._command = [
            RAY, "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false", "--num-cpus=3", f"--port={gcs}",
            "--node-ip-address=127.0.0.1", "--object-store-memory=100000000", f"--temp-dir={self._temporary}", *ports,
        ]  # fmt: skip

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while self._log.read_text().count("Ray runtime started") == 0 or not self._answers():
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.5)

    def _answers(self) -> bool:
        line = [RAY, "status", "--address", self.address]
        return subprocess.run(line, capture_output=True, check=False, timeout=60).returncode == 0

    def kill(self) -> None:
        """As if the machine had gone: no process of it says goodbye."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=60)
        shutil.rmtree(self._temporary, ignore_errors=True)


@pytest.mark.skipif("SARM_CHAOS" not in os.environ, reason="takes minutes: make test-chaos")
def test_a_training_whose_head_is_killed_goes_on_with_the_next_one(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for stage in ("sarm", "evaluation", "contexts", "features"):
        shutil.rmtree(out / stage)
    head = Head(tmp_path)
    head.start()
    try:
        command = [sys.executable, str(ROOT / "jobs" / "train_sarm.py"), "tiny", "--out", str(out), "--supervise"]
        command += ["--reward.checkpoint-every-steps", "2", "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db"]
        command += ["--ray-address", head.address, "--cpus-per-worker", "1"]
        with (tmp_path / "job.log").open("w") as log:
            job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _SECONDS
        while not list((out / "training" / "sarm").glob("step-*")):
            assert job.poll() is None, (tmp_path / "job.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "job.log").read_text()[-3000:]
            time.sleep(0.05)
        head.kill()
        killed = time.monotonic()
        while "supervisor: " not in (tmp_path / "job.log").read_text():
            assert time.monotonic() < killed + 120, "the job waits for a head that has gone"
            time.sleep(1)
        head.start()
        assert job.wait(timeout=_SECONDS) == 0, (tmp_path / "job.log").read_text()[-3000:]
        assert "sarm goes on after step" in (tmp_path / "job.log").read_text()
        alone, disturbed = (load_file(folder / "sarm" / "model.safetensors") for folder in (finished, out))
        assert all(torch.equal(alone[name], disturbed[name]) for name in alone)
    finally:
        head.stop()
