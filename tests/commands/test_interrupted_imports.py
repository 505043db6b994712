"""Ctrl-C in the first seconds of a job, while it still imports: one line, status 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A library that takes its time, says that it is being imported, and makes of an interrupt what compiled ones make of it.
SLOW = """
import pathlib, time
pathlib.Path({mark!r}).touch()
try:
    time.sleep(120)
except KeyboardInterrupt:
    raise ImportError("half a library") from None
"""


# tyro is imported with the command line, before any setting is read; torch by the work, when the job is under way.
@pytest.mark.parametrize(("library", "said"), [("tyro", "interrupted before anything was started"), ("torch", "interrupted; finished stages are kept")])  # fmt: skip
@pytest.mark.parametrize("program", [["jobs/train_sarm.py"], ["-m", "sarm.commands", "train-sarm"]], ids=["script", "program"])  # fmt: skip
def test_an_interrupt_while_a_library_loads_is_one_line_and_status_130(
    library: str, said: str, program: list[str], tmp_path: Path
) -> None:
    mark = tmp_path / "importing"
    (tmp_path / f"{library}.py").write_text(SLOW.format(mark=str(mark)))
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "platform")])
    command = [sys.executable, *program, "tiny", "--out", str(tmp_path / "out")]
    job = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        # A shell that runs the tests in the background has made them, and what they start, deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        until = time.monotonic() + 300
        while not mark.exists():
            assert job.poll() is None, job.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)
        job.send_signal(signal.SIGINT)
        errors = job.communicate(timeout=300)[1]
    finally:
        job.kill()
    assert job.returncode == 130, errors
    (line,) = [line for line in errors.splitlines() if "interrupted" in line]
    assert line.startswith(said)
    assert "Traceback" not in errors
    assert len(errors.splitlines()) == 1, errors
