"""A command: the settings it takes, what it does with them, and its help. Scripts in `jobs/` and the program `sarm` run the same one."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sarm.settings.extras import Extra
from sarm.stages.job import run_command, run_job
from sarm.stages.preset_command import Made


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
    made: Made | None = None
    """What it reads of the folder of a run: then its first argument may be a preset too, whose stages come first."""
    needs: tuple[Extra, ...] = ()
    """The extras without which it cannot do its work; help and plans do without."""
    is_server: bool = False
    other: "Mapping[tuple[str, ...], Command]" = field(default_factory=dict)
    """The command that it is instead where one of these flags is given."""

    def run(self, arguments: Sequence[str] | None = None) -> None:
        """Do what the arguments say (those of the process, if None), and exit as `run_job` does."""
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
