"""Jobs that read what the chain makes, started by a preset: which flags are the chain's, which their own, and what they read."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sarm.settings.jobs import Pipeline
from sarm.settings.presets import PRESETS
from sarm.settings.run import ChainSettings, RunSettings


class Made(NamedTuple):
    """What a command reads of the folder of a run: the job that makes it, and the flags that name it."""

    job: type
    """Settings of the job whose stages come first."""
    flags: Callable[[Path], dict[str, str]]
    """From the run's folder to the command's own flags; a name without dashes is a positional argument."""
    check: Callable[[Any], None] = lambda _: None
    """Checks the command's other inputs; raises UserError for one that cannot be read, before the chain is paid for."""


def names_a_preset(arguments: Sequence[str]) -> bool:
    """Whether a command line begins with a preset, and not with a folder of the same name."""
    return bool(arguments) and arguments[0] in PRESETS and not Path(arguments[0]).exists()


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of the chain (its preset first) and those of the command. Flags of where and how things run go to both.

    `--out` is the run's folder, so that it goes to the chain alone.
    """
    sections = {field.name for field in dataclasses.fields(Pipeline)} - {"run"}
    of_runs = {field.name for field in dataclasses.fields(RunSettings)} - {"out", "config"}
    of_chains = {field.name for field in dataclasses.fields(ChainSettings)} - of_runs
    chain, own = [arguments[0]], []
    for flag, *values in _groups(arguments[1:]):
        name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
        name = name.removeprefix("no_") if name not in of_chains | of_runs else name
        section, dot, _ = name.partition(".")
        if name in of_chains or (dot and section in sections):
            chain += [flag, *values]
        elif name in of_runs:
            chain += [flag, *values]
            own += [flag, *values]
        else:
            own += [flag, *values]
    return chain, own


def with_defaults(own: Sequence[str], made: Made, out: Path) -> list[str]:
    """The command's arguments, with what it reads of the run's folder where they do not name it."""
    given = {argument.partition("=")[0] for argument in own}
    positional = [value for name, value in made.flags(out).items() if not name.startswith("--")]
    named = [part for name, value in made.flags(out).items() if name.startswith("--") and name not in given for part in (name, value)]  # fmt: skip
    return [*positional, *named, *own]


def in_order(chain: Any, job: Callable[[Any], None], made: Made) -> Callable[[Any], None]:
    """The command behind the stages that make what it reads."""

    def both(config: Any) -> None:
        from sarm.stages.chain import run_chain

        made.check(config)
        run_chain(chain)
        job(config)

    return both


def _groups(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Each flag with its values."""
    group: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and group:
            yield group
            group = []
        group.append(argument)
    if group:
        yield group
