"""Supervises a job: it runs a configuration once at a time, starts it again where that helps, and ends with a status that says what to do.

0: done. 2: the user has to change something. 75: stopped, and the same command continues it. Any other status is the job's own. Ray and
the scheduler look after nodes, workers and scale; this module watches the one process that drives the job.
"""

import collections
import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from sarm.contracts.manifest import MANIFEST, write_atomically
from sarm.contracts.untrusted import read_json
from sarm.engine.failures import AGAIN, DONE, USER
from sarm.engine.results import check_place, check_room
from sarm.engine.stopping import ASKED_FOR, BY_DEFAULT, INTERRUPTED, JOB_TOKEN, STARTED_AGAIN, SUPERVISED, without_flag
from sarm.engine.submission import submission_id
from sarm.engine.writer_lock import HeldError, WriterLock
from sarm.settings.results_root import submitted_as
from sarm.settings.started import started

_MAX_BACKOFF = 60.0
_PR_SET_PDEATHSIG = 1


class _Failure(NamedTuple):
    """How a process failed: a text by which the same failure is recognised again, and whether a signal ended it."""

    name: str
    by_signal: bool


def is_supervised(run: Any) -> bool:
    """Whether this process is to watch over the job's: `--supervise` says so, or it was submitted and nobody watches over it yet."""
    return bool(run.supervise or (submitted_as() and not os.environ.get(SUPERVISED)))


def supervise_this(arguments: Sequence[str], config: Any) -> int:
    """`supervise` this process's own command line, without `--supervise`.

    A submitted job that did not ask for it is started again only if a signal ended it or it exits with status 75, and
    locks nothing but what its stages lock. Raises UserError for an output folder that cannot be used.
    """
    check_place(config.run)
    check_room(config)
    command = [sys.executable, *started().again, *without_flag(arguments, "--supervise")]
    if config.run.supervise:
        return supervise(command, config)
    return _Runs(command, config.run.out, config.run.max_restarts, 0.5, is_asked_for=False).until_done()


def supervise(command: Sequence[str], config: Any, backoff: float = 0.5) -> int:
    """Run `command` (the job without supervision) until it is done or no start of it will help; returns the exit status.

    A process that died, or exits with status 75, is started again, and the job goes on where it was. It stops with the status of the job
    when a failure comes a second time with nothing new on disk in between, or after `max_restarts` such starts in a row.
    Raises UserError if another job writes to the folder; the same job that runs already is left to it (0).
    """
    run, own_id = config.run, submission_id(started().script, config)
    try:
        with WriterLock(run.out, own_id):
            return _Runs(command, run.out, run.max_restarts, backoff).until_done()
    except HeldError as held:
        if held.owner != own_id:
            raise
        print(f"{own_id} is running already: {held}", flush=True)
        return DONE


class _Runs:
    """The processes of one job, one after the other."""

    def __init__(
        self, command: Sequence[str], out: Path, max_restarts: int, backoff: float, *, is_asked_for: bool = True
    ):
        self._is_asked_for = is_asked_for
        self._command, self._out, self._max_restarts, self._backoff = command, out, max_restarts, backoff
        self._process: subprocess.Popen[bytes] | None = None
        # The token tells a job what an earlier start of it has done.
        self._environment = {
            SUPERVISED: ASKED_FOR if is_asked_for else BY_DEFAULT,
            JOB_TOKEN: os.environ.get(JOB_TOKEN) or uuid.uuid4().hex,
        }
        self._stop = threading.Event()
        # The file lies beside the folder and outlives this process, so that a queue which starts the job again does not try the same for ever.
        self._notes = out.with_name(f".{out.name}.failure.json")

    def until_done(self) -> int:
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._loop()
        finally:
            for number, handler in before.items():
                # After a signal to stop, the supervisor ends with the job's status, whatever is sent until the process has ended.
                signal.signal(number, signal.SIG_IGN if self._stop.is_set() else handler)

    def _loop(self) -> int:
        last = self._known()
        in_a_row = 0
        while True:
            code, failure = self._run_once()
            if code in (DONE, USER, INTERRUPTED):
                self._notes.unlink(missing_ok=True)
                return code
            if self._stop.is_set():
                return AGAIN
            if not self._is_asked_for and not failure.by_signal and code != AGAIN:
                return code
            now = {"failure": failure.name, "progress": self._progress()}
            has_moved = last.get("progress") != now["progress"]
            in_a_row = 1 if has_moved else in_a_row + 1
            # A signal comes from outside. An error that has come twice will come a third time.
            is_same = not has_moved and not failure.by_signal and last.get("failure") == failure.name
            self._notes.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._notes, json.dumps(now))
            if is_same or in_a_row > self._max_restarts:
                why = "the same failure again" if is_same else f"{in_a_row} failures in a row"
                self._say(f"{why}, and nothing new on disk between them: {failure.name}. Giving up")
                self._notes.unlink(missing_ok=True)
                return code if code > 0 else 128 - code
            last = now
            wait = min(_MAX_BACKOFF, self._backoff * 2 ** (in_a_row - 1))
            self._say(f"{failure.name}; starting again in {wait:g} s, which goes on with what is unfinished")
            if self._stop.wait(wait):
                return AGAIN

    def _run_once(self) -> tuple[int, _Failure]:
        process = subprocess.Popen(
            self._command, stderr=subprocess.PIPE, preexec_fn=die_with_parent, env=os.environ | self._environment
        )
        self._process, self._environment[STARTED_AGAIN] = process, "1"
        if self._stop.is_set():
            process.send_signal(signal.SIGTERM)
        tail: collections.deque[str] = collections.deque(maxlen=50)
        assert process.stderr is not None
        reader = threading.Thread(target=_copy, args=(process.stderr, tail), daemon=True)
        reader.start()
        code = process.wait()
        # Children of a killed process may keep the pipe open.
        reader.join(timeout=5)
        return code, _failure(code, list(tail))

    def _pass_on(self, number: int, _: Any) -> None:
        self._stop.set()
        # A terminal sends its interrupt to both processes, and the job counts the two as one.
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _progress(self) -> list[str]:
        """What is on disk: finished folders, parts of unfinished ones, training states."""
        patterns = (f"**/{MANIFEST}", "**/part-*.parquet")
        return sorted(
            path.relative_to(self._out).as_posix() for pattern in patterns for path in self._out.glob(pattern)
        )

    def _known(self) -> dict[str, Any]:
        try:
            return dict(read_json(self._notes))
        except (OSError, ValueError, TypeError):
            return {}

    def _say(self, message: str) -> None:
        print(f"supervisor: {message}", file=sys.stderr, flush=True)


def _failure(code: int, lines: Sequence[str]) -> _Failure:
    if code < 0:
        return _Failure(f"killed by {signal.Signals(-code).name}", True)
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    # The same error may come with other numbers and addresses.
    name = re.sub(r"0x[0-9a-f]+|\d+", "N", said)[:300]
    return _Failure(f"status {code}: {name}", False)


def _copy(source: IO[bytes], tail: collections.deque[str]) -> None:
    for line in source:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        tail.append(line.decode("utf-8", "replace"))


def die_with_parent() -> None:
    """In a new process: ask Linux for SIGTERM when the parent is killed, so that the job does not run on without its supervisor."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
