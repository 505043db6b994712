"""An ablation whose driver is killed twice and one of whose workers is killed once ends with the table of one that nobody disturbed.

Minutes: part of `make test-chaos` alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not os.environ.get("SARM_CHAOS"), reason="minutes of kills: `make test-chaos`")
_TIMES = {"training_seconds", "evaluation_seconds"}
_SECONDS_FOR_PROGRESS = 200


def start(out: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, str(ROOT / "tune" / "ablation.py"), "tiny", "--out", str(out), "--sweep.widths", "4",
        "--sweep.components", "sarm", "--reward.checkpoint-every-steps", "2", "--reward.epochs", "6",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    environment["PYTHONPATH"] = str(ROOT / "platform")
    log = (out.parent / f"{out.name}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, text=True)


def wait_for(is_there: Callable[[], bool], sweep: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _SECONDS_FOR_PROGRESS
    while not is_there():
        assert sweep.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline, "the sweep does not get on"
        time.sleep(0.05)


def states(out: Path) -> list[str]:
    return sorted(path.parent.parent.parent.name + path.name for path in out.glob("cells/*/training/*/step-*"))


def kill_driver(sweep: subprocess.Popen[str]) -> None:
    children = psutil.Process(sweep.pid).children(recursive=True)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    # The next run needs the cores of Ray's processes, which would end by themselves within a minute.
    _, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=30)


def kill_worker(sweep: subprocess.Popen[str]) -> bool:
    for child in psutil.Process(sweep.pid).children(recursive=True):
        if "RayTrainWorker" in " ".join(child.cmdline()):
            child.send_signal(signal.SIGKILL)
            return True
    return False


def table(out: Path) -> list[dict]:
    columns = pq.read_table(out / "report" / "table.parquet")
    return columns.drop_columns(list(_TIMES)).to_pylist()


def test_kills_of_driver_and_worker_change_nothing(tmp_path):
    clean, disturbed = tmp_path / "clean", tmp_path / "disturbed"
    assert start(clean).wait(timeout=600) == 0, (tmp_path / "clean.log").read_text()[-3000:]

    assert (tmp_path / "clean.log").read_text().count("extract sentence ends: started") == 1, "one pass for both layers"

    # Kills of the passes before are `test_chaos.py`'s.
    for stage in ("corpus", "pairs", "activations"):
        shutil.copytree(clean / stage, disturbed / stage)
    shutil.copy(clean / "sweep.json", disturbed)
    sweep = start(disturbed)
    wait_for(lambda: any(disturbed.glob("sae/*/stage.json")), sweep)
    kill_driver(sweep)

    sweep = start(disturbed)
    wait_for(lambda: bool(states(disturbed)), sweep)
    before = states(disturbed)
    kill_driver(sweep)

    sweep = start(disturbed)
    wait_for(lambda: len(set(states(disturbed)) - set(before)) > 1, sweep)
    assert kill_worker(sweep)
    assert sweep.wait(timeout=600) == 0, (tmp_path / "disturbed.log").read_text()[-3000:]

    said = (tmp_path / "disturbed.log").read_text()
    assert "goes on after step" in said
    assert said.count("a worker died, starting again from step") >= 1
    assert table(disturbed) == table(clean)
    assert not psutil.Process().children(recursive=True)
