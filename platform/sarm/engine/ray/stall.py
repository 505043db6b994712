"""Ends workers that hang, after writing down their stacks, so that training can continue from its last state on new workers."""

import faulthandler
import os
import re
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from sarm.settings.checks import NO_PROGRESS_SECONDS

# A slow machine has long pauses. A pause of this many times the longest one so far is a hang.
_PATIENCE = 10
# Setting the clock starts a thread, so it is not set at every beat.
_SECONDS_BETWEEN_SETTINGS = 1.0
# Ray Train ends all workers when the first one ends. So all write their stacks well before, however far apart their clocks are: on a loaded
# machine a worker's last beat can be seconds after its neighbour's. A stack of a worker that went on is dropped.
_WRITES_AT = 0.5
_WAITS_FOR_OTHERS = "distributed_c10d.py"
_PLACE = re.compile(r'File "(.+?)", line (\d+) in (\S+)')


class StallGuard:
    """Ends this worker's process if `beat` has not been called for long, and leaves the stacks of its threads in a file.

    A worker that waits in a collective for a hanging worker hangs too. Both end, and `who_stood_still`
    says which one caused it. The first beat starts the clock, and leaving the context stops it.
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
        """The worker has done something. Outside the context this has no effect."""
        if self._file is None:
            return
        now = time.monotonic()
        if self._last:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        if now - self._set >= min(_SECONDS_BETWEEN_SETTINGS, self._seconds / 10):
            self._set = now
            limit = max(self._seconds, _PATIENCE * self._longest)
            # Neither of these needs Python's lock, so they work while a call hangs in C. A thread writes the stacks, and the
            # kernel ends the process, because nobody handles its SIGALRM.
            faulthandler.dump_traceback_later(_WRITES_AT * limit, file=self._file)
            signal.setitimer(signal.ITIMER_REAL, limit)
            if os.fstat(self._file.fileno()).st_size:
                # The pause was long enough for stacks to be written, but the worker went on.
                os.ftruncate(self._file.fileno(), 0)
                os.lseek(self._file.fileno(), 0, os.SEEK_SET)


def who_stood_still(folder: Path) -> str:
    """Which workers caused a hang, and where, according to the stacks that guards left in `folder`; '' if there are none."""
    stacks = {path.stem.rpartition("-")[2]: path.read_text() for path in sorted(folder.glob("stack-*.txt"))}
    stopped = {rank: stack for rank, stack in stacks.items() if stack}
    # Workers that wait for others are not the cause. They are named only if no other worker left a stack.
    own = {rank: stack for rank, stack in stopped.items() if _WAITS_FOR_OTHERS not in stack} or stopped
    return ", ".join(f"worker {rank} stood still {_place(stack)}" for rank, stack in own.items())


def _place(stack: str) -> str:
    """Where the training thread was."""
    threads = stack.split("\n\n")
    training = next((thread for thread in threads if " in _call" in thread), threads[-1])
    found = _PLACE.search(training)
    return f"at {Path(found[1]).name}:{found[2]} in {found[3]}" if found else "in no Python code"
