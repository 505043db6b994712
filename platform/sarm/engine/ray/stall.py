"""Workers that stand still are ended with their stacks written down, so that training can go on from its last state on new ones."""

import faulthandler
import os
import re
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from sarm.settings.checks import NO_PROGRESS_SECONDS

# A machine may be slow, but a pause of this many times the longest so far is no slowness.
_PATIENCE = 10
# Setting the clock starts a thread.
_SECONDS_BETWEEN_SETTINGS = 1.0
# With the first worker's end Ray Train ends the others too: all write their stacks before that, however far apart their clocks are.
_WRITES_AT = 0.8
_WAITS_FOR_OTHERS = "distributed_c10d.py"
_PLACE = re.compile(r'File "(.+?)", line (\d+) in (\S+)')


class StallGuard:
    """Ends this worker's process when nothing has beaten for long, and leaves the stacks of its threads in a file.

    A worker that waits in a collective for one that stands still elsewhere stands still too: both end, and `who_stood_still`
    says which was which. The first beat starts the clock, leaving the context stops it.
    """

    def __init__(self, folder: Path, rank: int):
        self._path, self._seconds = folder / f"stack-{rank}.txt", NO_PROGRESS_SECONDS
        self._file: TextIO | None = None
        self._last = self._set = 0.0
        self._longest = 0.0

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        assert self._file is not None
        self._file.close()
        self._file, self._last, self._set = None, 0.0, 0.0
        self._path.unlink(missing_ok=True)

    def beat(self) -> None:
        """Something was done; outside the context nobody asks."""
        if self._file is None:
            return
        now = time.monotonic()
        if self._last:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        if now - self._set >= min(_SECONDS_BETWEEN_SETTINGS, self._seconds / 10):
            self._set = now
            limit = max(self._seconds, _PATIENCE * self._longest)
            # Neither needs Python's lock, so that a call that never returns from C does not stop them: a thread writes the stacks,
            # and the kernel ends the process, whose SIGALRM nobody handles.
            faulthandler.dump_traceback_later(_WRITES_AT * limit, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, limit)
            if os.fstat(self._file.fileno()).st_size:
                # It stood long, but went on.
                os.ftruncate(self._file.fileno(), 0)
                os.lseek(self._file.fileno(), 0, os.SEEK_SET)


def who_stood_still(folder: Path) -> str:
    """Which workers stood still of themselves, and where, by the stacks that guards left in `folder`; '' if none did."""
    stacks = {path.stem.rpartition("-")[2]: path.read_text() for path in sorted(folder.glob("stack-*.txt"))}
    stopped = {rank: stack for rank, stack in stacks.items() if stack}
    # Of those that wait for others nothing is to be learnt, unless no other was able to say anything.
    own = {rank: stack for rank, stack in stopped.items() if _WAITS_FOR_OTHERS not in stack} or stopped
    return ", ".join(f"worker {rank} stood still {_place(stack)}" for rank, stack in own.items())


def _place(stack: str) -> str:
    """Where the thread stood that trains."""
    threads = stack.split("\n\n")
    training = next((thread for thread in threads if " in _call" in thread), threads[-1])
    found = _PLACE.search(training)
    return f"at {Path(found[1]).name}:{found[2]} in {found[3]}" if found else "in no Python code"
