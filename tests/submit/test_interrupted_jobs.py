"""Submitted jobs whose client or driver is killed, or that are told to stop."""

import contextlib
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from tests.ray_head import RAY, Head


def until(what: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_whose_client_is_killed_goes_on(head: Head, clone: Path) -> None:
    out = Path(head.environment["HOME"]) / "sarm-outputs" / "alone"
    line = [RAY, "job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml"]
    client = subprocess.Popen(
        [*line, "--", "python", "jobs/prepare_data.py", "tiny", "--out", "outputs/alone"],
        cwd=clone, env=head.environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert client.stdout is not None
    assert any("submitted successfully" in said for said in client.stdout)
    client.kill()
    client.wait()
    until((out / "pairs" / "manifest.json").exists)


def drivers(word: str) -> list[psutil.Process]:
    """The processes that do a job's work, not those that watch over them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            line, parent = process.info["cmdline"] or [], process.parent()
            if word in line and "python" in line[0] and parent is not None and word in parent.cmdline():
                found.append(process)
    return found


def test_a_job_whose_driver_is_killed_is_started_again(head: Head, clone: Path) -> None:
    line = "ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python jobs/prepare_data.py tiny --out outputs/killed"
    killed: list[int] = []

    def kill() -> None:
        until(lambda: drivers("outputs/killed"))
        for process in drivers("outputs/killed"):
            process.kill()
            killed.append(process.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    done = head.run(line, clone)
    thread.join()
    assert done.returncode == 0, done.stdout[-4000:]
    assert killed
    assert "supervisor: killed by SIGKILL; starting again" in done.stdout
    assert (Path(head.environment["HOME"]) / "sarm-outputs" / "killed" / "pairs" / "manifest.json").exists()


def test_ray_job_stop_lets_a_training_save_its_state_and_say_what_goes_on(
    head: Head, clone: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    shutil.copytree(finished, out)
    for stage in ("sarm", "scalar_head", "evaluation", "contexts", "features"):
        shutil.rmtree(out / stage)
    address = f"--address {head.address}"
    work = f"jobs/train_sarm.py tiny --out {out} --reward.epochs 300 --cpus-per-worker 1"
    line = f"ray job submit {address} --working-dir . --runtime-env cluster/runtime_env.yaml"
    assert head.run(f"{line} --no-wait --submission-id stopped -- python {work}", clone).returncode == 0  # fmt: skip
    logs = f"ray job logs {address} stopped"
    # The file that these logs are: asking Ray again and again would leave the training no core.
    until(lambda: any(" step " in log.read_text() for log in head.temporary.glob("session_2*/logs/job-driver-stopped.log")), 500)  # fmt: skip
    head.run(f"ray job stop {address} stopped", clone)
    said = head.run(logs, clone).stdout
    assert f"this command goes on: ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python {work}" in said  # fmt: skip
    assert re.search(r"stopped after step \d+: it was asked to; its state is saved", said)
    # From there on: on a busy machine Ray's controller logs a request of its own that timed out, and calls it safe to ignore.
    assert "Traceback" not in said[said.index("stopped by SIGTERM") :]
    assert list(out.rglob("step-*/manifest.json"))
