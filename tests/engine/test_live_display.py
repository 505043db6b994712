"""The live display, on pseudo-terminals: what is on the screen, what stays on it, and that plain output is as it was."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from rich.cells import cell_len
from tests.engine.screen import Pty, Screen, opened

import sarm.engine.live.display as live
from sarm.engine.live.display import displayed, is_wanted, note_stage, note_work
from sarm.engine.live.layout import Shown, lines
from sarm.engine.live.progress_line import Progress, pass_line, training_line

TERMINAL = {"TERM": "xterm-256color"}
SUBMITTED = '{"metadata": {"job_submission_id": "r1"}}'


def shown_of(progress: Progress | None, work: str = "train SAE") -> Shown:
    shown = Shown(since=0.0)
    shown.begin_stage("train_sae", 3, 7, 0.0)
    shown.begin(work, 0.0)
    if progress is not None:
        shown.take(progress._replace(step=(progress.step or 20) - 20, share=0.0), 10.0)
        shown.take(progress, 20.0)
    return shown


TRAINING = Progress("sae_text", 0.42, 20, "", ("loss 0.02088", "fvu 0.09017", "alive_share 0.3906"), 14.0)


def plain(shown: Shown, width: int, *, in_ascii: bool = False, now: float = 22.0) -> list[str]:
    return [line.plain for line in lines(shown, now, width, in_ascii=in_ascii)]


def test_the_lines_say_stage_share_rate_time_left_and_figures() -> None:
    assert plain(shown_of(TRAINING), 79) == [
        f"stage 3 of 7  train SAE  {'━' * 13}{'─' * 17}  42%  12 s left",
        "sae_text  step 20  2 steps/s  loss 0.02088  fvu 0.09017  alive_share 0.3906",
    ]


@pytest.mark.parametrize("progress", [None, TRAINING, Progress("", 0.5, None, "1 of 2 latents", (), None)])
@pytest.mark.parametrize("work", ["train SAE", "模型的激活值 " * 9])
def test_every_line_fits_its_width(work: str, progress: Progress | None) -> None:
    for width in range(1, 120):
        for in_ascii in (False, True):
            for line in plain(shown_of(progress, work), width, in_ascii=in_ascii):
                assert cell_len(line) <= width
                assert line.isascii() or not in_ascii or "模" in line


def test_forty_columns_have_the_share_and_the_time_left() -> None:
    assert plain(shown_of(TRAINING), 39, in_ascii=True) == [
        "3/7 train SAE  ###-----  42%  12 s left",
        "sae_text  step 20  2 steps/s  loss 0.0~",
    ]


def test_before_there_is_progress_and_after_it_the_time_since_the_beginning_is_shown() -> None:
    shown = shown_of(None)
    assert plain(shown, 79, now=187.0) == ["stage 3 of 7  train SAE  3 min 07 s so far"]
    shown.take(TRAINING, 190.0)
    assert "42%" in plain(shown, 79, now=190.0)[0]
    shown.take(TRAINING._replace(share=1.0), 200.0)
    assert plain(shown, 79, now=7500.0) == ["stage 3 of 7  train SAE  2 h 05 min so far"]


def test_time_left_is_reckoned_where_the_line_does_not_say_it() -> None:
    shown = Shown(since=0.0)
    for share, now in ((0.1, 10.0), (0.3, 20.0)):
        shown.take(Progress("", share, None, f"{share * 100:.0f} of 100 latents", (), None), now)
    assert plain(shown, 79, now=20.0)[0].endswith("30%  35 s left")
    # Workers that died start again from an earlier state.
    shown.take(Progress("", 0.2, None, "20 of 100 latents", (), None), 30.0)
    assert plain(shown, 79, now=30.0)[0].endswith("20%  30 s so far")


@pytest.mark.parametrize(("more", "wanted"), [
    ({}, True), ({"TERM": "dumb"}, False), ({"TERM": ""}, True), ({"CI": "true"}, False), ({"NO_COLOR": "1"}, True),
    ({"SARM_SUPERVISED": "1"}, False), ({"JPY_PARENT_PID": "7"}, False),
])  # fmt: skip
def test_a_display_is_for_terminals_that_somebody_watches(more: dict[str, str], wanted: bool) -> None:
    with opened(80) as pty, os.fdopen(os.dup(pty.inner), "w") as stream:
        assert is_wanted(stream, TERMINAL | more) == wanted
    assert not is_wanted(io.StringIO(), TERMINAL | more)
    assert not is_wanted(sys.__stdout__ or io.StringIO(), {})


def test_a_submitted_job_has_none(monkeypatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", SUBMITTED)
    with opened(80) as pty, os.fdopen(os.dup(pty.inner), "w") as stream:
        assert not is_wanted(stream, TERMINAL)


@pytest.fixture
def terminal(monkeypatch) -> Iterator[Pty]:
    """A pseudo-terminal of 80 columns, in an environment that has nothing against a display."""
    with opened(80) as pty:
        for name in ("CI", "NO_COLOR", "SARM_SUPERVISED", "JPY_PARENT_PID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        yield pty


@contextlib.contextmanager
def shown_on(terminal: Pty, folder: Path, encoding: str = "utf-8") -> Iterator[None]:
    """A display on it while the body runs; warnings go to `log`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, os.fdopen(os.dup(terminal.inner), "w", buffering=1, encoding=encoding))
        with displayed(folder / "log"):
            yield


def test_progress_is_drawn_below_and_its_last_line_stays_above(terminal: Pty, tmp_path: Path) -> None:
    screen = Screen(80)
    with shown_on(terminal, tmp_path):
        note_stage("train_sae", 3, 7)
        note_work("train SAE")
        print("[18:30:49] train SAE: started")
        print(training_line("sae_text", 0.42, 20, ["loss 0.5"], 12.0))
        screen.feed(terminal.read())
        assert screen.rows[0] == "[18:30:49] train SAE: started"
        assert screen.rows[1].startswith("stage 3 of 7  train SAE  ━")
        assert screen.rows[1].endswith("42%  12 s left")
        assert screen.rows[2:] == ["sae_text  step 20  loss 0.5"]
        assert (screen.row, screen.column) == (1, 0), "a line of a library that goes past the display overwrites it"
        last = training_line("sae_text", 1.0, 48, ["loss 0.02"], 0.0)
        print(last)
        print("a line of more than eighty columns is not wrapped at words, so that a command can be copied " * 2)
        print("error of a worker", file=sys.stderr)
    screen.feed(terminal.read())
    assert screen.rows[:2] == ["[18:30:49] train SAE: started", last]
    assert "".join(screen.rows[2:5]).startswith("a line of more than eighty columns is not wrapped at words, so that")
    assert screen.rows[-2:] == ["error of a worker", ""]
    assert screen.is_coloured


@pytest.mark.parametrize("columns", [79, 60, 40, 24])
def test_a_terminal_that_becomes_narrower_keeps_no_remains(terminal: Pty, tmp_path: Path, columns: int) -> None:
    with shown_on(terminal, tmp_path):
        note_work("extract sentence ends")
        print(pass_line("extract sentence ends", 100, 200, "rows", ["76,094 tokens/s", "padding 3.4%"], 9.0))
        wide = Screen(80).feed(terminal.read())
        # As terminals do that wrap anew: what was written again, the cursor still before the first letter.
        screen = Screen(columns).feed("\r\n".join(wide.rows))
        screen.row = screen.column = 0
        terminal.resize(columns)
        time.sleep(live._SECONDS_BETWEEN_FRAMES * 2)
        screen.feed(terminal.read())
        assert len(screen.rows) == 2
        assert all(len(row) < columns for row in screen.rows)
        assert screen.rows[0].endswith("s left")
    assert screen.feed(terminal.read()).rows == [""]


def test_a_low_terminal_has_one_line(terminal: Pty, tmp_path: Path) -> None:
    terminal.resize(80, 3)
    with shown_on(terminal, tmp_path):
        print(training_line("sarm", 0.5, 20, ["loss 0.5"], 12.0))
        assert len(Screen(80).feed(terminal.read()).rows) == 1


def test_a_bar_of_a_library_is_the_second_line_and_vanishes_with_it(terminal: Pty, tmp_path: Path) -> None:
    from tqdm import tqdm

    screen, frame = Screen(80), live._SECONDS_BETWEEN_FRAMES * 1.5
    with shown_on(terminal, tmp_path):
        note_work("prepare corpus")
        with tqdm(total=4, desc="tiny:texts", leave=False, mininterval=0, file=sys.stderr) as bar:
            bar.update(2)
            time.sleep(frame)
            print("a line")
            screen.feed(terminal.read())
            assert screen.rows[0] == "a line"
            assert screen.rows[1].startswith("prepare corpus  ")
            assert screen.rows[2].startswith("tiny:texts:  50%")
        time.sleep(frame)
        assert len(screen.feed(terminal.read()).rows) == 2
        print("no end", end="")
    assert screen.feed(terminal.read()).rows == ["a line", "no end"]


def test_nothing_is_drawn_while_another_process_has_the_terminal(terminal: Pty, tmp_path: Path) -> None:
    screen = Screen(80)
    with shown_on(terminal, tmp_path):
        note_work("prepare corpus")
        with sys.stderr.handed_over():  # type: ignore[attr-defined]
            screen.feed(terminal.read())
            os.write(terminal.inner, b"downloading 10 %")
            time.sleep(live._SECONDS_BETWEEN_FRAMES * 1.5)
            os.write(terminal.inner, b"\rdownloaded 100 %\n")
            assert screen.feed(terminal.read()).rows == ["downloaded 100 %", ""]
        time.sleep(live._SECONDS_BETWEEN_FRAMES * 1.5)
        assert screen.feed(terminal.read()).rows[1].startswith("prepare corpus  ")


def test_without_colours_and_without_unicode(terminal: Pty, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with shown_on(terminal, tmp_path, "ascii"):
        note_work("das Ähnliche")
        print(training_line("sarm", 0.5, 20, ["loss 0.5"], 12.0))
        said = terminal.read()
    assert said.isascii()
    screen = Screen(80).feed(said)
    assert not screen.is_coloured
    assert "das ?hnliche  ###############--------------- " in screen.rows[0]


def test_warnings_of_libraries_are_counted_and_their_file_is_named_at_the_end(terminal: Pty, tmp_path: Path) -> None:
    with shown_on(terminal, tmp_path):
        print("2026-11-30 18:30:24,555 WARNING a.py:1 -- b", file=sys.stderr)
        assert terminal.read() == ""
    assert terminal.read() == f"1 warning of libraries: {tmp_path / 'log'}\r\n"


def test_what_fails_in_the_display_stops_no_job(terminal: Pty, tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    with shown_on(terminal, tmp_path):
        note_work("train SAE")
        monkeypatch.setattr(live, "lines", fail)
        print("one")
        line = training_line("sarm", 0.5, 20, ["loss 0.5"], 12.0)
        print(line)
    said = Screen(80).feed(terminal.read()).rows
    assert said == ["one", line, "the live display ended before the job: ZeroDivisionError: a bug", ""]


def test_streams_that_libraries_have_kept_still_work_when_it_is_gone(terminal: Pty, tmp_path: Path) -> None:
    with shown_on(terminal, tmp_path):
        kept = sys.stderr
        assert kept.isatty()
        assert kept.encoding == "utf-8"
    kept.write("one\n")
    kept.writelines(["two", "\n"])
    kept.flush()
    assert terminal.read() == "one\r\ntwo\r\n"


def test_plain_output_is_as_it_was(capsys, tmp_path: Path) -> None:
    before = sys.stdout
    line = training_line("sarm", 0.5, 20, ["loss 0.5"], 12.0)
    with displayed(tmp_path / "log"):
        assert sys.stdout is before
        note_stage("train_sae", 3, 7)
        note_work("train SAE")
        print(line)
        print("2026-11-30 18:30:24,555 WARNING a.py:1 -- b", file=sys.stderr)
    assert capsys.readouterr() == (f"{line}\n", "2026-11-30 18:30:24,555 WARNING a.py:1 -- b\n")
    assert list(tmp_path.iterdir()) == []


# A light job, as a user starts it.
JOB = """
import os, time
from sarm.engine.live.display import note_work
from sarm.engine.live.progress_line import training_line
from sarm.engine.stopping import saving
from sarm.settings.checks import UserError
from sarm.settings.jobs import TrainSarm
from sarm.stages.job import run_job

def main(config):
    note_work("train SARM")
    print(training_line("sarm", 0.5, 20, ["loss 0.5"], 12.0), flush=True)
    time.sleep(1)
    if os.environ["WHAT"] == "fails":
        raise UserError("the disk is full")
    if os.environ["WHAT"] == "breaks":
        raise ZeroDivisionError("a bug")
    time.sleep(60)

if __name__ == "__main__":
    run_job(TrainSarm, main, "A job.")
"""


def run(folder: Path, pty: Pty, what: str, number: signal.Signals | None = None) -> tuple[int, Screen]:
    """The exit status, and the screen at the end; once it is drawn, `number` is sent."""
    script = folder / "one_job.py"
    script.write_text(JOB)
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR", "SARM_SUPERVISED", "RAY_ADDRESS")}
    platform = Path(live.__file__).parents[3]

    def own() -> None:
        ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    process = subprocess.Popen(
        [sys.executable, str(script), "tiny", "--out", str(folder / "out")],
        stdin=pty.inner, stdout=pty.inner, stderr=pty.inner, start_new_session=True, preexec_fn=own,
        env={**clean, **TERMINAL, "PYTHONPATH": str(platform), "WHAT": what},
    )  # fmt: skip
    screen = Screen(80)
    deadline = time.monotonic() + 60
    while not any("s left" in row for row in screen.rows):
        assert process.poll() is None, screen.rows
        assert time.monotonic() < deadline, screen.rows
        screen.feed(pty.read(0.05))
    if number is signal.SIGINT:
        os.write(pty.outer, b"\x03")
    elif number is not None:
        process.send_signal(number)
    while process.poll() is None:
        screen.feed(pty.read(0.05))
    return process.returncode, screen.feed(pty.read(0.05))


@pytest.mark.parametrize(("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "stopped by SIGTERM")])  # fmt: skip
def test_a_signal_leaves_one_line_and_nothing_of_the_display(
    tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    with opened(80) as pty:
        code, screen = run(tmp_path, pty, "waits", number)
    said = "".join(screen.rows).removeprefix("^C")
    assert code == status
    assert said.startswith(f"{word}; finished stages are kept, and this command goes on: python ")
    assert "SARM " not in said
    assert (screen.row, screen.column) == (len(screen.rows) - 1, 0)


def test_an_error_is_one_line_below(tmp_path: Path) -> None:
    with opened(80) as pty:
        code, screen = run(tmp_path, pty, "fails")
    assert (code, screen.rows) == (2, ["error: the disk is full", ""])


def test_a_traceback_is_whole(tmp_path: Path) -> None:
    with opened(80) as pty:
        code, screen = run(tmp_path, pty, "breaks")
    assert code == 1
    assert screen.rows[0] == "Traceback (most recent call last):"
    assert screen.rows[-2] == "ZeroDivisionError: a bug"
