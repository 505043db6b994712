"""Jobs that are killed, refused, stopped and started twice: real processes, of a job that needs nothing heavy."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sarm.engine.submission import submission_id, without_flag
from sarm.engine.writer_lock import HeldError, WriterLock
from sarm.settings.checks import UserError
from sarm.settings.jobs import TrainSarm
from sarm.settings.presets import PRESETS
from sarm.settings.run import RunSettings

ROOT = Path(__file__).parents[2]
# A job that does one part a start, writes down that it started, and then does what it is told for this start.
JOB = """
import os, signal, sys, time
from pathlib import Path
from sarm.settings.checks import UserError
from sarm.settings.jobs import TrainSarm
from sarm.stages.job import run_job

def main(config):
    out, plan = config.run.out, os.environ["PLAN"].split(",")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "starts").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    start = len((out / "starts").read_text().splitlines())
    what = plan[min(start, len(plan)) - 1]
    if "+" in what:
        (out / f"part-{start:06}.parquet").touch()
        what = what.strip("+")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        raise RuntimeError(f"the {start}. start has this fault at {id(out):#x}")
    elif what == "refuse":
        raise UserError("mend it. Pass --other.")
    elif what == "lost":
        raise ConnectionResetError("the server went away")
    elif what == "wait":
        (out / "waits").touch()
        time.sleep(60)

run_job(TrainSarm, main, "A job.")
"""


class Job:
    """The job's script, with its output folder and a plan of what its starts do."""

    def __init__(self, folder: Path):
        self.out = folder / "out"
        (folder / "jobs").mkdir()
        self.script = folder / "jobs" / "one_job.py"
        self.script.write_text(JOB)

    def start(self, plan: str, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(self.script), "tiny", "--out", str(self.out), "--supervise", *flags]
        environment = {**os.environ, "PLAN": plan, "PYTHONPATH": str(ROOT / "platform")}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def run(self, plan: str, *flags: str) -> tuple[int, str]:
        """Exit status, and what was said."""
        process = self.start(plan, *flags)
        said = process.communicate(timeout=300)
        return process.returncode, "".join(said)

    def starts(self) -> int:
        return len((self.out / "starts").read_text().splitlines())

    def until_it_waits(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.out / "waits").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_job_that_is_killed_on_its_way_is_started_again_until_it_is_done(job):
    code, said = job.run("kill+,lost+,kill+,done", "--max-restarts", "1")
    assert (code, job.starts()) == (0, 4), said
    assert "killed by SIGKILL; starting again" in said
    assert not list(job.out.parent.glob(".out*")), "no lock and no note is left"


def test_the_same_error_twice_with_nothing_done_between_ends_it(job):
    code, said = job.run("raise")
    assert (code, job.starts()) == (1, 2), said
    assert "the same failure again, and nothing new on disk" in said


def test_other_failures_end_after_as_many_starts_in_a_row_as_allowed(job):
    code, said = job.run("kill", "--max-restarts", "1")
    assert (code, job.starts()) == (128 + signal.SIGKILL, 2), said
    assert "2 failures in a row" in said


def test_a_user_s_error_is_told_once(job):
    code, said = job.run("refuse")
    assert (code, job.starts()) == (2, 1)
    assert said.strip() == "error: mend it. Pass --other."


def test_sigterm_goes_through_to_the_job_and_comes_back_as_75(job):
    process = job.start("wait")
    job.until_it_waits()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75, said
    assert "stopped by SIGTERM" in said
    assert (job.starts(), job.run("done")[0]) == (1, 0)


def test_a_second_submit_finds_the_first_and_another_job_is_refused(job):
    first = job.start("wait")
    try:
        job.until_it_waits()
        code, said = job.run("done", "--num-workers", "2")
        assert (code, "is running already" in said) == (0, True), said
        assert str(first.pid) in said
        code, said = job.run("done", "--reward.lr", "1e-3")
        assert (code, "is being written by one-job-" in said) == (2, True), said
        assert job.starts() == 1
    finally:
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=300)


def test_a_supervisor_that_is_killed_takes_its_job_along_and_leaves_no_lock_that_holds(job):
    first = job.start("wait")
    job.until_it_waits()
    child = psutil.Process(int((job.out / "starts").read_text()))
    first.kill()
    first.wait()
    assert psutil.wait_procs([child], timeout=30)[0] == [child], "the job is still there"
    assert job.run("done")[0] == 0


def test_a_job_without_a_supervisor_says_75_where_another_try_may_help(job):
    environment = {**os.environ, "PLAN": "lost", "PYTHONPATH": str(ROOT / "platform")}
    command = [sys.executable, str(job.script), "tiny", "--out", str(job.out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 75
    assert done.stderr.strip() == (
        "error: ConnectionResetError: the server went away; the same command goes on with the unfinished stage"
    )


def test_the_name_of_a_job_depends_on_settings_and_inputs_and_on_nothing_else(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("{}\n")
    preset = PRESETS["tiny"][1]
    config = replace(
        preset, run=RunSettings(out=tmp_path / "out"), data=replace(preset.data, pairs=(str(tmp_path / "*.jsonl"),))
    )
    name = submission_id("jobs/pipeline.py", config)
    assert name.startswith("pipeline-")
    elsewhere = replace(config.run, num_workers=7, ray_address="auto", debug=True, supervise=True)
    assert submission_id("/x/jobs/pipeline.py", replace(config, run=elsewhere)) == name
    others = [
        submission_id("jobs/evaluate.py", config),
        submission_id("jobs/pipeline.py", replace(config, run=replace(config.run, seed=1))),
        submission_id("jobs/pipeline.py", replace(config, run=replace(config.run, out=tmp_path / "b"))),
        submission_id("jobs/pipeline.py", replace(config, reward=replace(config.reward, lr=1.0))),
    ]
    data.write_text("{}\n{}\n")
    others.append(submission_id("jobs/pipeline.py", config))
    (tmp_path / "more.jsonl").write_text("{}\n")
    others.append(submission_id("jobs/pipeline.py", config))
    assert len({name, *others}) == 7
    assert submission_id("jobs/train_sarm.py", preset.part(TrainSarm)) != name


def test_a_flag_is_taken_out_with_its_value():
    words = ["demo", "--submit", "http://a:1", "--out", "x", "--submit=http://b:2", "--supervise"]
    assert without_flag(words, "--submit", has_value=True) == ["demo", "--out", "x", "--supervise"]
    assert without_flag(words, "--supervise") == words[:-1]


def test_one_writer_at_a_time_and_the_next_when_it_is_done(tmp_path):
    with WriterLock(tmp_path / "out", "first"):
        with pytest.raises(HeldError, match=rf"out is being written by first \(process {os.getpid()} on"):
            WriterLock(tmp_path / "out", "second").__enter__()
        assert (tmp_path / ".out.lock").stat().st_size > 0
    assert list(tmp_path.iterdir()) == []
    with WriterLock(tmp_path / "out", "second"):
        pass


def test_a_file_system_without_links_has_locks_as_well(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with WriterLock(tmp_path / "out", "first"), pytest.raises(HeldError, match="by first"):
        WriterLock(tmp_path / "out", "second").__enter__()
    assert list(tmp_path.iterdir()) == []


def held_elsewhere(tmp_path: Path, beat: float = 0.1) -> Path:
    """The lock of a process on another machine."""
    path = tmp_path / ".out.lock"
    held = {"owner": "far", "host": "elsewhere", "place": ["elsewhere"], "pid": 1, "started": 0.0}
    path.write_text(json.dumps({**held, "beat_seconds": beat, "beat": 0, "id": "far"}))
    return path


def test_a_lock_of_another_machine_is_taken_over_when_it_no_longer_counts(tmp_path):
    held_elsewhere(tmp_path)
    with WriterLock(tmp_path / "out", "near"):
        assert json.loads((tmp_path / ".out.lock").read_text())["owner"] == "near"


def test_a_lock_of_another_machine_that_counts_is_respected(tmp_path):
    path = held_elsewhere(tmp_path, beat=0.5)
    counting = subprocess.Popen(
        [sys.executable, "-c", f"""
import json, time, pathlib
path = pathlib.Path({str(path)!r})
for beat in range(1, 600):
    held = json.loads(path.read_text()) | {{"beat": beat}}
    path.with_suffix(".new").write_text(json.dumps(held))
    path.with_suffix(".new").replace(path)
    time.sleep(0.05)
"""]
    )  # fmt: skip
    try:
        with pytest.raises(HeldError, match="by far"):
            WriterLock(tmp_path / "out", "near").__enter__()
    finally:
        counting.kill()
        counting.wait()


def test_a_lock_of_a_dead_process_a_torn_one_and_a_reused_number_hold_nobody(tmp_path):
    script = "import sys; from pathlib import Path; from sarm.engine.writer_lock import WriterLock; WriterLock(Path(sys.argv[1]), 'dead').__enter__(); import os; os._exit(9)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], env=environment, check=False)
    left = json.loads((tmp_path / ".out.lock").read_text())
    assert left["owner"] == "dead"
    for held in (json.dumps(left), "", json.dumps({**left, "pid": os.getpid()})):
        (tmp_path / ".out.lock").write_text(held)
        with WriterLock(tmp_path / "out", "next"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_counts_while_it_is_held_and_not_once_it_was_taken_away(tmp_path):
    lock = WriterLock(tmp_path / "out", "frozen", beat_seconds=0.05)
    with lock:
        deadline = time.monotonic() + 30
        while json.loads(lock.path.read_text())["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        held_elsewhere(tmp_path)
        time.sleep(0.2)
        assert json.loads(lock.path.read_text())["owner"] == "far"
    assert lock.path.exists(), "and another's is left alone"


def test_held_is_a_user_s_error(tmp_path):
    assert issubclass(HeldError, UserError)
    with WriterLock(tmp_path / "out", "a"), pytest.raises(UserError) as refused:
        WriterLock(tmp_path / "out", "b").__enter__()
    assert "\n" not in str(refused.value)
