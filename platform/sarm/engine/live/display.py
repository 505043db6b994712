"""The live display of a job on a terminal: one line or two at the bottom, above which everything else is printed.

Nobody calls it with progress: it stands in the place of stdout and stderr, and takes the progress lines out of what is printed there, by this
process or, through Ray, by workers. Where there is no terminal there is no display, and the same lines are printed as they are.

The cursor is never hidden, and waits at the beginning of the first line. So a process that is killed leaves no terminal to be mended, and a
terminal that becomes narrower, and wraps the lines, still has all of them at or below the cursor.
"""

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

from sarm.engine.live.above import Above
from sarm.engine.live.layout import Shown, lines
from sarm.engine.live.library_lines import LibraryLines
from sarm.engine.live.progress_line import bare, read
from sarm.engine.stopping import SUPERVISED, listener
from sarm.settings.checks import StoppedError
from sarm.settings.results_root import submitted_as

_SECONDS_BETWEEN_FRAMES = 0.5
# A process that is asked to stop does not wait longer for a thread that is printing.
_SECONDS_TO_CLOSE = 1.0
# With fewer rows the second line would leave too little for what is printed.
_FEW_ROWS = 6
_ERASE = "\r\x1b[J"
_SIGNS = "━─…"
# A job has these where what looks like its terminal is none: on a build server, under a supervisor, in a notebook.
_NO_TERMINAL = ("CI", SUPERVISED, "JPY_PARENT_PID")
_active: "Display | None" = None


def is_wanted(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether somebody watches the stream in a terminal that can redraw a line.

    A build server (`CI`) and a notebook, whose `!` is a terminal to the job, keep what would be redrawn. A supervisor copies what its job writes
    to stderr past the display.
    """
    if environment.get("TERM", "dumb") == "dumb" or any(environment.get(name) for name in _NO_TERMINAL):
        return False
    return stream.isatty() and not submitted_as()


@contextlib.contextmanager
def displayed(warnings: Path) -> Iterator[None]:
    """Show how the job goes while the body runs, on a terminal; `warnings` is the file for what libraries warn of."""
    global _active
    if _active is not None or not is_wanted(sys.stdout, os.environ):
        yield
        return
    _active = display = Display(sys.stdout, LibraryLines(warnings))
    if (signals := listener()) is not None:
        signals.before_line = display.close
    try:
        with display:
            yield
    finally:
        _active = None


def note_stage(stage: str, number: int, num_stages: int) -> None:
    """Tell the display, where there is one, that the stage of this number begins."""
    if _active is not None:
        _active.note(lambda shown: shown.begin_stage(stage, number, num_stages, time.monotonic()))


def note_work(work: str) -> None:
    """Tell the display, where there is one, what is being done now; '' when it is done."""
    if _active is not None:
        _active.note(lambda shown: shown.begin(work, time.monotonic()))


class Display:
    """Draws on `terminal`, and stands for it and for stderr while its context lasts. What fails in it ends it, and nothing else."""

    def __init__(self, terminal: TextIO, library_lines: LibraryLines):
        self._terminal, self._library_lines = terminal, library_lines
        self._descriptor = terminal.fileno()
        self._in_ascii = not _can_say(_SIGNS, terminal.encoding)
        self._shown = Shown(since=time.monotonic())
        # The handler of a signal runs in a thread that may hold it.
        self.lock = threading.RLock()
        self._process, self._is_open, self._is_drawn, self._is_aside = os.getpid(), False, False, False
        self._ended = threading.Event()
        self._failure = ""

    def __enter__(self) -> "Display":
        self._before = sys.stdout, sys.stderr
        self._above = Above(self, sys.stdout), Above(self, sys.stderr)
        self._is_open = True
        sys.stdout = cast(TextIO, self._above[0])
        if sys.stderr.isatty():
            sys.stderr = cast(TextIO, self._above[1])
        threading.Thread(target=self._tick, name="display", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
        # Libraries keep the streams that they found: these pass on what is written to them from now on.
        sys.stdout, sys.stderr = self._before
        for stream in self._above:
            stream.release()
        for line in (self._library_lines.told(), self._failure):
            if line:
                print(line, flush=True)

    def close(self) -> None:
        """Take the lines off the terminal and draw no more; a handler of signals may call it."""
        has_lock = self.lock.acquire(timeout=_SECONDS_TO_CLOSE)
        try:
            with contextlib.suppress(OSError):
                self._erase()
            self._is_open = False
            self._ended.set()
        finally:
            if has_lock:
                self.lock.release()

    def note(self, change: Callable[[Shown], None]) -> None:
        """Change what is shown."""
        with self._guarded():
            change(self._shown)
            self._draw()

    def print(self, stream: TextIO, whole: str) -> None:
        """Print whole lines above."""
        if kept := [line for line in whole.splitlines(keepends=True) if not self._takes(line)]:
            with self._guarded():
                self._erase()
            # What fails here would have failed without a display.
            stream.write("".join(kept))
            stream.flush()
        with self._guarded():
            self._draw()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Draw nothing while the body runs."""
        with self._guarded():
            self._erase()
            self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    def is_open_here(self) -> bool:
        """Whether it draws in this process: a fork has a copy of it, and no thread."""
        return self._is_open and self._process == os.getpid()

    def _takes(self, line: str) -> bool:
        """Whether the line is not printed, since it is shown or a file has it. The last line of a work's progress stays on the screen."""
        with self._guarded():
            if not self._is_in_front():
                return False
            if (progress := read(line)) is not None:
                self._shown.take(progress, time.monotonic())
                return progress.share < 1
            return self._library_lines.takes(line)
        return False

    def _tick(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_FRAMES):
            with self._guarded():
                self._draw()

    def _draw(self) -> None:
        if not self._is_open or self._is_aside or not self._is_in_front():
            return
        self._shown.bar = next((bare(stream.rest).strip() for stream in self._above if stream.rest), "")
        if self._shown.is_empty:
            self._erase()
            return
        frame = self._frame(*os.get_terminal_size(self._descriptor))
        # A signal may have closed it meanwhile.
        if self._is_open:
            os.write(self._descriptor, frame.encode(self._terminal.encoding, "replace"))
            self._is_drawn = True

    def _frame(self, columns: int, rows: int) -> str:
        from rich.console import Console

        # Some terminals do not know their size, and some wrap as soon as their last column is written.
        columns, rows = columns or 80, rows or 24
        drawn = lines(self._shown, time.monotonic(), columns - 1, in_ascii=self._in_ascii)
        drawn = drawn[: 1 if rows < _FEW_ROWS else 2]
        console = Console(file=io.StringIO(), force_terminal=True, width=columns, highlight=False)
        with console.capture() as captured:
            console.print(*drawn, sep="\r\n", end="", no_wrap=True, crop=True)
        up = f"\x1b[{len(drawn) - 1}A" if len(drawn) > 1 else ""
        return f"{_ERASE}{captured.get()}{up}\r"

    def _erase(self) -> None:
        if self._is_open and self._is_drawn and self._is_in_front():
            os.write(self._descriptor, _ERASE.encode())
            self._is_drawn = False

    def _is_in_front(self) -> bool:
        """Whether the terminal is this job's: in the background of a shell it is for whoever types there."""
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:
            # It is nobody's, as in some containers.
            return True

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What fails in the body ends the display, with a line once the job has ended."""
        try:
            with self.lock:
                yield
        except StoppedError:
            # A signal's, which ends the job.
            raise
        except Exception as error:
            self._failure = f"the live display ended before the job: {type(error).__name__}: {error}"
            self.close()


def _can_say(signs: str, encoding: str) -> bool:
    try:
        signs.encode(encoding)
    except (UnicodeError, LookupError):
        return False
    return True
