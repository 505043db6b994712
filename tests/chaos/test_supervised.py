"""A real training whose driver is killed: its supervisor starts it again, and the weights are those of a run that nothing disturbed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif("SARM_CHAOS" not in os.environ, reason="takes minutes: make test-chaos")
def test_a_training_whose_driver_is_killed_twice_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for stage in ("sarm", "evaluation", "contexts", "features"):
        shutil.rmtree(out / stage)
    command = [sys.executable, str(ROOT / "jobs" / "train_sarm.py"), "tiny", "--out", str(out), "--supervise"]
    command += ["--reward.checkpoint-every-steps", "2", "--mlflow-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    states = out / "training" / "sarm"
    newest, kills = -1, 0
    deadline = time.monotonic() + 400
    while kills < 2:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        steps = [int(path.name.removeprefix("step-")) for path in states.glob("step-*")]
        if max(steps, default=-1) > newest:
            newest = max(steps)
            (driver,) = [
                child for child in psutil.Process(process.pid).children() if "train_sarm.py" in child.cmdline()[1]
            ]
            os.kill(driver.pid, signal.SIGKILL)
            driver.wait()
            kills += 1
        time.sleep(0.05)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-3000:]
    assert said.count("killed by SIGKILL; starting again") == 2, said[-3000:]
    alone, disturbed = (load_file(folder / "sarm" / "model.safetensors") for folder in (finished, out))
    assert all(torch.equal(alone[name], disturbed[name]) for name in alone)
