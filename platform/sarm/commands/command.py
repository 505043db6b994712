"""A command: the settings it takes, what it does with them, and its help. Scripts in `jobs/` and the program `sarm` run the same one.

This file imports nothing that takes time, so that Ctrl-C is answered from the first moment on: what does is imported inside `importing`.
"""

import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from sarm.settings.extras import Extra

if TYPE_CHECKING:
    from sarm.stages.preset_command import Made

_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Command:
    """What one job is made of. A command with `presets` takes one as its first argument; all others take flags alone."""

    settings: type
    main: Callable[[Any], None]
    about: str | None
    """The docstring of its module: what it does, in one line, then examples."""
    presets: Mapping[str, Any] | None = None
    explain: Callable[[Any], str] | None = None
    """What `--dry-run` prints; None: the plan of the job's stages."""
    made: "Made | None" = None
    """What it reads of the folder of a run: then its first argument may be a preset too, whose stages come first."""
    needs: tuple[Extra, ...] = ()
    """The extras without which it cannot do its work; help and plans do without."""
    is_server: bool = False
    other: "Mapping[tuple[str, ...], Command]" = field(default_factory=dict)
    """The command that it is instead where one of these flags is given."""

    def run(self, arguments: Sequence[str] | None = None) -> None:
        """Do what the arguments say (those of the process, if None), and exit as `run_job` does."""
        with importing():
            from sarm.stages.job import run_command, run_job

        arguments = list(sys.argv[1:] if arguments is None else arguments)
        given = {argument.partition("=")[0] for argument in arguments}
        for flags, command in self.other.items():
            if given & set(flags):
                command.run(arguments)
                return
        about = self.about or ""
        if self.presets is not None:
            run_job(
                config_type=self.settings,
                job=self.main,
                description=about,
                arguments=arguments,
                presets=self.presets,
                explain=self.explain,
                needs=self.needs,
            )
            return
        run_command(
            config_type=self.settings,
            job=self.main,
            description=about,
            arguments=arguments,
            made=self.made,
            needs=self.needs,
            is_server=self.is_server,
        )


def command_of(module: str) -> Command:
    """The command of a module of this room."""
    with importing():
        command: Command = importlib.import_module(f"sarm.commands.{module}").COMMAND
    return command


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """While the body imports, Ctrl-C ends the process with one line and status 130.

    At once, for nothing has been started, and an exception might come out of a half imported library as another one. A handler that somebody
    else has set, and a signal that a shell has a job ignore, stay as they are.
    """
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(_: int, __: FrameType | None) -> None:
    os.write(2, b"interrupted before anything was started\n")
    os._exit(_INTERRUPTED)
