"""A real training whose driver is killed: its supervisor starts it again, and the weights are those of a run that nothing disturbed."""

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from tests.chaos.trainings import copy_up_to_training, is_same_model, states, train_sarm


@pytest.mark.skipif("SARM_CHAOS" not in os.environ, reason="takes minutes: make test-chaos")
def test_a_training_whose_driver_is_killed_twice_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    copy_up_to_training(finished, out)
    options = ("--supervise", "--reward.checkpoint-every-steps", "2")
    command = train_sarm(out, f"sqlite:///{tmp_path}/mlflow.db", *options)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    newest, kills = -1, 0
    deadline = time.monotonic() + 400
    while kills < 2:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        # None between two of them; workers that outlive theirs for a moment may still save.
        drivers = [child for child in psutil.Process(process.pid).children() if "train_sarm.py" in child.cmdline()[1]]
        steps = [int(path.name.removeprefix("step-")) for path in states(out)]
        if drivers and max(steps, default=-1) > newest:
            newest = max(steps)
            drivers[0].kill()
            drivers[0].wait()
            kills += 1
        time.sleep(0.05)
    said = process.communicate(timeout=400)[0]
    assert process.returncode == 0, said[-3000:]
    assert said.count("killed by SIGKILL; starting again") == 2, said[-3000:]
    assert is_same_model(finished, out)
