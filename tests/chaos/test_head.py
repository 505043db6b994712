"""The cluster's head is killed under a training: the job ends instead of waiting for it, and goes on when there is a head again."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.chaos.trainings import copy_up_to_training, is_same_model, states, train_sarm
from tests.ray_head import RAY, free_ports

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
        deadline = time.monotonic() + 400
        while self._log.read_text().count("Ray runtime started") == 0 or not self._answers():
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.5)

    def _answers(self) -> bool:
        line = [RAY, "status", "--address", self.address]
        return subprocess.run(line, capture_output=True, check=False, timeout=300).returncode == 0

    def kill(self) -> None:
        """As if the machine had gone: no process of it says goodbye."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(timeout=300)
        shutil.rmtree(self._temporary, ignore_errors=True)


@pytest.mark.skipif("SARM_CHAOS" not in os.environ, reason="takes minutes: make test-chaos")
@pytest.mark.usefixtures("private_cluster")
def test_a_training_whose_head_is_killed_goes_on_with_the_next_one(finished: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "job.log"
    copy_up_to_training(finished, out)
    head = Head(tmp_path)
    head.start()
    options = (
        "--supervise",
        "--reward.checkpoint-every-steps",
        "2",
        "--ray-address",
        head.address,
        "--cpus-per-worker",
        "1",
    )
    try:
        with log.open("w") as said:
            command = train_sarm(out, f"sqlite:///{tmp_path}/mlflow.db", *options)
            job = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + _SECONDS
        while not any(states(out)):
            assert job.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        head.kill()
        killed = time.monotonic()
        while "starting again" not in log.read_text():
            assert job.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < killed + 120, "the job waits for a head that has gone"
            time.sleep(1)
        print(f"head killed; its job started again after {time.monotonic() - killed:.0f} s")
        head.start()
        assert job.wait(timeout=_SECONDS) == 0, log.read_text()[-3000:]
        assert "sarm goes on after step" in log.read_text()
        assert is_same_model(finished, out)
    finally:
        head.stop()
