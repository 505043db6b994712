"""The program `sarm`: one command for every job. It does what the scripts in `jobs/` do, by the same code."""

import contextlib
import difflib
import functools
import io
import operator
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from sarm import __version__
from sarm.commands.command import command_of, importing
from sarm.commands.registry import ENTRIES, GROUPS, Entry, name_of
from sarm.settings.started import note_command

SHELLS = ("bash", "zsh", "fish")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names on the others; exits with status 2 and one line if there is none of that name."""
    with importing():
        from sarm.stages.help_text import HELP
    name, *others = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in HELP:
        print(overview())
        return
    if name in ("--version", "-V", "version"):
        print(f"sarm {__version__}")
        return
    if name == "completion":
        _print_completion(others)
        return
    entry = ENTRIES.get(name.replace("_", "-"))
    if entry is None:
        guess = difflib.get_close_matches(name.replace("_", "-"), [*ENTRIES, "completion"], 1)
        hint = f", did you mean {guess[0]}?" if guess else "."
        print(f"error: sarm has no command {name!r}{hint} Try sarm --help.", file=sys.stderr)
        sys.exit(2)
    given = _given(entry, others)
    note_command(name_of(entry.module), entry.script)
    # Whatever asks for the job's own arguments finds them here.
    sys.argv = [sys.argv[0] if sys.argv else "sarm", *given]
    command_of(entry.module).run(given)


def overview() -> str:
    """All commands with what they do, on one screen."""
    width = max(map(len, ENTRIES))
    lines = [
        "Reward models whose score is a sum of a few nameable features.",
        "",
        "    sarm demo                        train one, and see what it rewards",
        "    sarm COMMAND --help              examples and flags of a command",
    ]
    for title, entries in GROUPS.items():
        lines += ["", title, *(f"  {entry.name:<{width}}  {entry.about}" for entry in entries)]
    return "\n".join([*lines, "", f"sarm --version; sarm completion {'|'.join(SHELLS)}; pip install 'sarm[train]'"])


def _given(entry: Entry, arguments: Sequence[str]) -> list[str]:
    """A job's arguments, with those that its command stands for."""
    from sarm.stages.help_text import HELP

    if entry.name == "inspect" and (not arguments or arguments[0].startswith("-")):
        if not set(HELP) & set(arguments):
            print(
                "error: the source to inspect comes first, then flags. Try sarm inspect tiny:pairs --rows 100.",
                file=sys.stderr,
            )
            sys.exit(2)
        return [*entry.first, "SOURCE", *arguments]
    return [*entry.first, *arguments]


def _print_completion(arguments: Sequence[str]) -> None:
    """Print what makes a shell complete commands and flags."""
    if list(arguments[1:]) or not arguments or arguments[0] not in SHELLS:
        print(f"error: sarm completion takes one of {', '.join(SHELLS)}. Try: source <(sarm completion bash)", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    import tyro

    from sarm.stages.help_text import few

    # Flags are told as to whoever uses the program.
    note_command("completion", "")
    kinds: list[Any] = []
    for entry in ENTRIES.values():
        command = command_of(entry.module)
        # With these arguments a command is another, with other flags.
        kind = next((one for flags, one in command.other.items() if set(flags) & set(entry.first)), command).settings
        kinds.append(Annotated[few(kind, whole=True)[0], tyro.conf.subcommand(entry.name)])
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(functools.reduce(operator.or_, kinds), prog="sarm", args=["--tyro-print-completion", arguments[0]])
    # A line break in the help of a flag would end what it completes to, and make words of the help candidates.
    print("\n".join(line.replace("\\n", " ") if line.startswith("COMPLETION_SPEC") else line for line in script.getvalue().splitlines()))  # fmt: skip
