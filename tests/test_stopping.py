"""Ctrl-C and SIGTERM: one line with the command that goes on, within 3 s, in real processes. Nothing else is printed, by Ray neither."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 3.0
# A light job that is told how to spend its time.
JOB = """
import hashlib, os, signal, sys, time
from sarm.settings.checks import UserError
from sarm.settings.jobs import TrainSarm
from sarm.stages.job import run_job
from sarm.engine.stopping import Listener, leave_if_asked, listener, saving

def swallow():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

def save(raises=None):
    asked = []
    with saving(lambda: asked.append(1), "it saves"):
        print("ready", flush=True)
        while not asked:
            time.sleep(0.01)
        time.sleep(float(os.environ.get("SAVES_FOR", "0")))
    print("noise", file=sys.stderr)
    if raises:
        raise raises
    leave_if_asked()

def main(config):
    what = os.environ["WHAT"]
    if what.startswith("save"):
        return save(UserError("the disk is full") if what == "save-fails" else None)
    print("ready", flush=True)
    if what == "compiled":
        # Python's handlers do not run before it returns.
        hashlib.pbkdf2_hmac("sha512", b"x", b"y", 100_000_000)
    elif what == "swallow":
        swallow()
    elif what == "within":
        # The second signal while the main thread writes the line of the first, which is a matter of luck otherwise.
        own, say = listener(), Listener.say
        def interrupted(self, line):
            signal.raise_signal(signal.SIGTERM)
            say(self, line)
        Listener.say = interrupted
        own._tell(signal.SIGTERM)
    time.sleep(60)

if __name__ == "__main__":
    if os.environ["WHAT"].startswith("before"):
        # While the command line is read, a dry run is described, a job is handed to a cluster.
        import sarm.stages.job as job
        import sarm.engine.submission as submission
        def wait(*_, **__):
            print("ready", flush=True)
            time.sleep(60)
        if os.environ["WHAT"] == "before-submit":
            submission.submit = wait
        elif os.environ["WHAT"] == "before-parse":
            job.parse = wait
    run_job(TrainSarm, main, "A job.", explain=wait if os.environ["WHAT"] == "before-dry-run" else None)
"""


class Job:
    """A process whose output goes to a file, and what it says after a signal."""

    def __init__(self, folder: Path, command: list[str], **environment: str):
        self._log = folder / "job.log"
        clean = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                env={**clean, "PYTHONPATH": str(ROOT / "platform"), **environment},
                # Whoever runs the tests in the background ignores Ctrl-C, and so would the job.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )  # fmt: skip

    def until(self, marker: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not re.search(marker, self._log.read_text()):
            assert self.process.poll() is None or re.search(marker, self._log.read_text()), self._log.read_text()[
                -3000:
            ]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.02)

    def stop(self, number: int, seconds: float = 120) -> tuple[int, list[str]]:
        """Exit status, and the lines that were printed after the signal; the first came in time."""
        before = len(self._log.read_text())
        self.process.send_signal(number)
        self.until("this command goes on", SECONDS)
        status = self.process.wait(timeout=seconds)
        return status, self._log.read_text()[before:].splitlines()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "jobs").mkdir()
    path = tmp_path / "jobs" / "one_job.py"
    path.write_text(JOB)
    return path


def start(script: Path, what: str, *flags: str, out: str = "a b", **environment: str) -> Job:
    job = Job(script.parent, [str(script), "tiny", "--out", out, *flags], WHAT=what, **environment)
    job.until("ready")
    return job


@pytest.mark.parametrize(("number", "word", "status"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "stopped by SIGTERM", 75)])  # fmt: skip
@pytest.mark.parametrize("what", ["sleep", "compiled"])
def test_the_line_names_the_command_letter_for_letter(
    script: Path, what: str, number: int, word: str, status: int
) -> None:
    command = f"python {os.path.relpath(script, ROOT)} tiny --out 'a b'"
    line = f"{word}; finished stages are kept, and this command goes on: {command}"
    assert start(script, what).stop(number) == (status, [line])


def test_what_takes_the_exception_for_its_own_is_ended_all_the_same(script: Path) -> None:
    status, lines = start(script, "swallow").stop(signal.SIGTERM)
    assert (status, len(lines)) == (75, 1)


def test_what_saves_is_waited_for_and_a_second_interrupt_is_not(script: Path) -> None:
    status, (line,) = start(script, "save").stop(signal.SIGTERM)
    assert status == 75
    assert line.startswith("stopped by SIGTERM; it saves; finished stages are kept")
    job = start(script, "save", SAVES_FOR="60")
    job.process.send_signal(signal.SIGINT)
    job.until("this command goes on", SECONDS)
    time.sleep(1.2)
    job.process.send_signal(signal.SIGINT)
    assert job.process.wait(timeout=20) == 130


def test_a_second_signal_while_the_first_is_answered_blocks_nothing(script: Path) -> None:
    assert start(script, "within").process.wait(timeout=300) == 75


@pytest.mark.parametrize(("what", "flags"), [("parse", ()), ("dry-run", ("--dry-run",)), ("submit", ("--submit", "http://h:1"))])  # fmt: skip
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_what_comes_before_the_work_is_answered_as_well(
    script: Path, what: str, flags: tuple[str, ...], number: int, status: int
) -> None:
    code, (line,) = start(script, f"before-{what}", *flags).stop(number)
    assert code == status
    assert line.endswith(shlex.join(["tiny", "--out", "a b", *flags]))


def test_a_state_that_cannot_be_saved_is_said(script: Path) -> None:
    status, lines = start(script, "save-fails").stop(signal.SIGTERM)
    assert (status, lines[1:]) == (75, ["error: the disk is full"])


def test_a_supervised_job_says_it_once_and_names_the_supervised_command(script: Path) -> None:
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        code, lines = start(script, "sleep", "--supervise").stop(number)
        assert (code, len(lines)) == (status, 1), lines
        assert lines[0].endswith("tiny --out 'a b' --supervise")


AS_JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"metadata": {"job_submission_id": "r1"}}'}


@pytest.mark.parametrize("supervise", [[], ["--supervise"]])
@pytest.mark.parametrize("place", ["", "/shared/my team"])
@pytest.mark.parametrize("address", ["", "http://h:8265"])
def test_a_submitted_job_names_what_it_was_submitted_with(
    script: Path, supervise: list[str], place: str, address: str
) -> None:
    environment = {name: value for name, value in (("SARM_RESULTS", place), ("SARM_SUBMITTED_TO", address)) if value}
    job = start(script, "sleep", *supervise, **AS_JOB, **environment, out=str(script.parent / "out"))
    _, (line, *_) = job.stop(signal.SIGTERM)
    own = ["python", os.path.relpath(script, ROOT), "tiny", "--out", str(script.parent / "out")]
    own = [*(["env", f"SARM_RESULTS={place}"] if place else []), *own]
    # --submit supervises whether or not it is told to.
    wanted = [*own, "--submit", address] if address else ["ray", "job", "submit", "--", *own, *supervise]
    assert line.endswith(f"this command goes on: {shlex.join(wanted)}")


def test_debug_shows_what_was_interrupted(script: Path) -> None:
    _, lines = start(script, "sleep", "--debug").stop(signal.SIGTERM)
    assert len(lines) >= 1


STAGES = [
    ("extract_activations", "activations", "started", "SIGTERM"),
    ("extract_activations", "activations", "started", "SIGINT"),
    ("train_sae", "sae", r"sae_text.* step \d", "SIGINT"),
    ("train_sarm", "sarm", r" step \d", "SIGINT"),
    ("evaluate", "evaluation", "evaluate: started", "SIGINT"),
    ("collect_contexts", "contexts", "contexts: started", "SIGTERM"),
]
STAGE_FOLDERS = ["activations", "sae", "sarm", "scalar_head", "evaluation", "contexts", "features"]
LONG = {"train_sae": ("--sae.text-epochs", "5000"), "train_sarm": ("--reward.epochs", "200")}


@pytest.mark.parametrize(("name", "stage", "marker", "signal_name"), STAGES)
def test_every_kind_of_stage_ends_with_one_line(
    finished: Path, ray_logs: Path, tmp_path: Path, name: str, stage: str, marker: str, signal_name: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.copy(finished.parent / "mlflow.db", tmp_path / "mlflow.db")
    # With all that was made from it, or the job would refuse to leave that behind.
    for later in STAGE_FOLDERS[STAGE_FOLDERS.index(stage) :]:
        shutil.rmtree(out / later)
    job = Job(
        tmp_path,
        [f"jobs/{name}.py", "tiny", "--out", str(out), *LONG.get(name, ())],
        RAY_TMPDIR=str(ray_logs),
    )
    job.until(marker)
    time.sleep(0.3)
    status, (line, *more) = job.stop(signal.Signals[signal_name])
    assert status == {"SIGINT": 130, "SIGTERM": 75}[signal_name]
    assert line.endswith(" ".join(["python", f"jobs/{name}.py", "tiny", "--out", str(out), *LONG.get(name, ())]))
    if name in LONG:
        assert len(more) == 1
        assert re.fullmatch(r"stopped after step \d+: it was asked to; its state is saved", more[0])
        assert list(out.parent.rglob("step-*/manifest.json")), "and there it is"
    else:
        assert more == []
