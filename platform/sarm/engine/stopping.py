"""Answers Ctrl-C and SIGTERM: one line at once, with the command that continues the job, and then nothing more on the screen.

Python runs its handlers between two instructions of the main thread, which may be inside a long call of a library. So the line is printed
by a thread that learns of the signal through a pipe (`signal.set_wakeup_fd`). Ray, Ray Train and Ray Tune put handlers of their own in
the place of these: `ray_starting` keeps them out while Ray starts, and the trainer and the sweep keep theirs out.
"""

import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from sarm.engine.failures import AGAIN, causes_of
from sarm.settings.checks import StoppedError, UserError
from sarm.settings.results_root import VARIABLE, is_in_package, submitted_as
from sarm.settings.started import started

INTERRUPTED = 130
# In the environment of a job: the name that a supervisor gives to all its starts of it, that one started it, and to which dashboard `--submit` handed it.
JOB_TOKEN = "SARM_JOB_TOKEN"
# In the environment of a job that has been started before.
STARTED_AGAIN = "SARM_STARTED_AGAIN"
SUPERVISED, SUBMITTED_TO = "SARM_SUPERVISED", "SARM_SUBMITTED_TO"
ASKED_FOR, BY_DEFAULT = "1", "submitted"
"""Values of `SUPERVISED`: `--supervise` asked for it, or every submitted job has it."""
_STATUS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: AGAIN}
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
# After this time the process ends, whatever is unfinished. That is safe: a stage survives a kill as well as an orderly end.
_SECONDS_TO_LEAVE = 15.0
# A terminal's interrupt reaches a job and its supervisor, which passes it on. Within this time they count as one.
_SECONDS_OF_ONE = 1.0
_active: "Listener | None" = None


def command_line(arguments: Sequence[str]) -> str:
    """The command that continues this one, as its user types it. It does not move aside again what this one has made anew."""
    arguments = without_flag(arguments, "--redo-from", has_value=True)
    script = [*started().typed, *arguments]
    # The results root may have been set for this job alone.
    place = ["env", f"{VARIABLE}={os.environ[VARIABLE]}"] if os.environ.get(VARIABLE) else []
    if address := os.environ.get(SUBMITTED_TO):
        return shlex.join([*place, *script, "--submit", address])
    if os.environ.get(SUPERVISED) == ASKED_FOR:
        script.append("--supervise")
    if submitted_as():
        package = ["--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml"]
        return shlex.join(
            ["ray", "job", "submit", *(package if is_in_package(Path.cwd()) else []), "--", *place, *script]
        )
    return shlex.join(script)


def without_flag(arguments: Sequence[str], flag: str, *, has_value: bool = False) -> list[str]:
    """A command line without a flag (and its value)."""
    kept: list[str] = []
    skipped = False
    for argument in arguments:
        if not skipped and argument.partition("=")[0] != flag:
            kept.append(argument)
        skipped = has_value and argument == flag
    return kept


class Listener:
    """While its context lasts, the first SIGINT or SIGTERM is answered with one line and ends the work in it.

    The context then exits with status 130 for SIGINT and 75 for SIGTERM, whatever Ray made of the exception on its way, and the
    process then ignores these signals, except for an interrupt after the first second. Outside the main thread it does nothing. With `is_loud` (`--debug`) the screen stays open, and the exception is what is raised.
    """

    def __init__(self, command: str, *, is_loud: bool = False):
        self._command, self._is_loud = command, is_loud
        self.asked: int | None = None
        """The signal that came first."""
        self.before_line: Callable[[], None] | None = None
        """Takes off the screen what the line would be written into."""
        self._asked_at = 0.0
        self._save: tuple[Callable[[], None], str] | None = None
        self._is_answered = self._is_leaving = False
        # The handler runs in the main thread, which may still hold the lock for an earlier signal.
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        global _active
        self._is_on = threading.current_thread() is threading.main_thread() and _active is None
        if self._is_on:
            _active = self
            self._screen = os.dup(2)
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            threading.Thread(target=self._listen, name="signals", daemon=True).start()
            self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            # A shell makes jobs in its background ignore Ctrl-C; that is respected.
            wanted = [number for number in _STATUS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
            # While Python ends it restores handlers, but it does not touch signals that are ignored.
            atexit.register(self._ignore)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _active
        if not self._is_on:
            return
        for number, handler in self._before.items():
            # The first signal decides the exit status, whatever is sent until the process has ended.
            signal.signal(number, handler if self.asked is None else self._handle_late)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])
        _active = None
        if self.asked is None:
            atexit.unregister(self._ignore)
            os.close(self._screen)
        elif error is None:
            self.say("the job was done before it could be stopped")
        elif not self._is_loud:
            if line := self._last_words(error):
                self.say(line)
            sys.exit(_STATUS[signal.Signals(self.asked)])

    def say(self, line: str) -> None:
        """Print a line although the screen is closed."""
        os.write(self._screen, f"{line}\n".encode())

    @contextlib.contextmanager
    def saving(self, save: Callable[[], None], what: str) -> Iterator[None]:
        """While the body runs, the first signal calls `save` instead of ending it; `what` tells the user what is then waited for."""
        self._save = (save, what)
        try:
            yield
        finally:
            self._save = None

    def leave_if_asked(self) -> None:
        """Raise StoppedError if a signal came that has not ended the work yet; called between two pieces of work."""
        if self.asked is not None:
            self._leave(signal.Signals(self.asked))

    def restore(self) -> None:
        """Put this handler back in the place of another's."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_first = self._answer(number)
        if is_first and self._save is not None:
            self._save[0]()
        elif is_first or (number == signal.SIGINT and time.monotonic() - self._asked_at > _SECONDS_OF_ONE):
            self._leave(signal.Signals(number))

    def _handle_late(self, number: int, _: FrameType | None) -> None:
        """The work has ended and the process is about to end. Only a second interrupt still has an effect."""
        assert self.asked is not None
        if number == signal.SIGINT and time.monotonic() - self._asked_at > _SECONDS_OF_ONE:
            os._exit(_STATUS[signal.Signals(self.asked)])

    def _ignore(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _leave(self, number: signal.Signals) -> None:
        self._leave_in_time()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise StoppedError(_WORDS[number])

    def _leave_in_time(self) -> None:
        if not self._is_leaving:
            self._is_leaving = True
            threading.Thread(target=self._give_up, name="leaving", daemon=True).start()

    def _give_up(self) -> None:
        """End the process if something on the way out hangs, or swallowed the exception."""
        time.sleep(_SECONDS_TO_LEAVE)
        assert self.asked is not None
        os._exit(_STATUS[signal.Signals(self.asked)])

    def _last_words(self, error: BaseException) -> str:
        """The message that is still due: that a state was saved, or that it could not be."""
        for cause in causes_of(error):
            if isinstance(cause, StoppedError | KeyboardInterrupt):
                return "" if str(cause) in ("", *_WORDS.values()) else str(cause)
        # Other errors while the work is being ended are Ray's reaction to the signal.
        return f"error: {error}" if isinstance(error, UserError) or not self._is_leaving else ""

    def _listen(self) -> None:
        while numbers := os.read(self._pipe[0], 64):
            for number in numbers:
                if number in self._before:
                    self._tell(number)
        os.close(self._pipe[0])

    def _answer(self, number: int) -> bool:
        """Whether the handler runs for the first signal."""
        self._tell(number)
        is_first, self._is_answered = not self._is_answered, True
        return is_first

    def _tell(self, number: int) -> None:
        # Not under the lock: another thread may be printing, and wait for it.
        if self.before_line is not None:
            self.before_line()
        with self._lock:
            if self.asked is not None:
                return
            self.asked, self._asked_at = number, time.monotonic()
            waits = f"; {self._save[1]}" if self._save is not None else ""
            self.say(
                f"{_WORDS[signal.Signals(number)]}{waits}; finished stages are kept, and this command goes on: {self._command}"
            )
            if self._save is None:
                # The main thread may be inside a long call of compiled code.
                self._leave_in_time()
            if not self._is_loud:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                os.close(nowhere)


def listener() -> Listener | None:
    """The listener of this process's job, if it has one and this is its thread."""
    return _active if threading.current_thread() is threading.main_thread() else None


def was_asked() -> bool:
    """Whether a signal came that ends this process's job."""
    return _active is not None and _active.asked is not None


def leave_if_asked() -> None:
    """Raise StoppedError or KeyboardInterrupt if the job was asked to stop and what it was doing has ended since."""
    if (active := listener()) is not None:
        active.leave_if_asked()


@contextlib.contextmanager
def saving(save: Callable[[], None], what: str) -> Iterator[None]:
    """While the body runs, the first signal calls `save`. Without a listener, SIGTERM alone does."""
    if (active := listener()) is not None:
        with active.saving(save, what):
            yield
        return
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: save())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def ray_starting() -> Iterator[None]:
    """Keep the handlers of this process while the body starts or joins Ray. Ray's handlers would end the process with status 15 and no message."""
    from ray._private import utils

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, theirs = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        # Ray's compiled part sets handlers too, which Python does not know of.
        if (active := listener()) is not None:
            active.restore()
        else:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
