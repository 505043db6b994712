"""The command lines of the documentation: fenced blocks and indented examples of its pages, and the examples of commands' docstrings."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sarm.commands.registry import ENTRIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What scripts and the program `sarm` show as help.
COMMANDS = sorted((ROOT / "platform" / "sarm" / "commands").glob("*.py"))

# What a line of an example begins with if it is a command and not what a command prints.
_SARM = "|".join([*ENTRIES, "--help", "--version", "completion"])
_PROGRAMS = rf"sarm(?= (?:{_SARM}) )|python|ray|make|docker|kubectl|sbatch|transformers|rm|pip|export|mkdir|hf|curl|jupyter|git|cd"
_IS_COMMAND = re.compile(rf"(?:\$ )?\(?(?:umask \d+; )?(?:[A-Z_]+=\S+ )*(?:{_PROGRAMS}) ")
_COMMENT = re.compile(r"\s{2,}# .*$")
_LANGUAGES = ("", "sh", "bash", "console", "shell")


class Command(NamedTuple):
    """A command as it is written, on one line, and where that is."""

    text: str
    where: str


def documented_commands() -> list[Command]:
    """Every command once, at its first place, in the order of pages and modules."""
    found: dict[str, Command] = {}
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for number, line in commands_of_page(page.read_text()):
            found.setdefault(line, Command(line, f"{name}:{number}"))
    for module in COMMANDS:
        name = module.relative_to(ROOT).as_posix()
        for number, line in commands_of_docstring(ast.get_docstring(ast.parse(module.read_text())) or ""):
            found.setdefault(line, Command(line, f"{name}:{number}"))
    return list(found.values())


def commands_of_page(text: str) -> Iterator[tuple[int, str]]:
    """(line number, command) of fenced blocks without a language, or with a shell's, and of indented examples."""
    fence: str | None = None
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.lstrip().startswith("```"):
            fence = None if fence is not None else line.strip().removeprefix("```")
            continue
        is_example = fence in _LANGUAGES if fence is not None else line.startswith("    ") and not _in_list(line)
        if not is_example or not _IS_COMMAND.match(line.strip() + " "):
            continue
        first, command = number, line.strip().removeprefix("$ ")
        while command.endswith("\\") and number < len(lines):
            command = command[:-1].rstrip() + " " + lines[number].strip()
            number += 1
        yield first, _COMMENT.sub("", command).strip()


def commands_of_docstring(text: str) -> Iterator[tuple[int, str]]:
    """(line number, command) of lines that begin with a command; what a line says behind several spaces is no part of it."""
    for number, line in enumerate(text.splitlines(), start=1):
        if _IS_COMMAND.match(line.strip()):
            yield number, re.split(r"\s{3,}", _COMMENT.sub("", line.strip()))[0]


def _in_list(line: str) -> bool:
    return bool(re.match(r"\s*([-*]|\d+\.) ", line))
