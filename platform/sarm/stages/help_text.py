"""What `--help` shows of a job: its examples, and the flags that people use. `--help-all` shows every flag.

A class of settings names its common flags in `common`; of a class that names none, all are shown.
"""

import ast
import contextlib
import dataclasses
import inspect
import itertools
import re
import shutil
import textwrap
import typing
from typing import Annotated, Any

import tyro

from sarm.settings.started import PROGRAM, command_name, started

HELP = ("-h", "--help", "--help-all")
_WIDTH = 80
# Of a command line: what is quoted stays whole.
_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")
_SCRIPT = re.compile(r"(?:python )?\b(?:jobs|tune)/(\w+)\.py")


def shown(description: str) -> str:
    """A job's docstring as help shows it: in the width of the terminal, commands indented and as whoever asks would type them."""
    text = description.strip()
    if started().is_program:
        text = re.sub(r"^ *ray job submit .*\n?", "", text, flags=re.M)
    text = as_typed(text).strip()
    return "\n".join(
        in_width(line) for line in re.sub(r"^(?=(python|ray job|sarm) )", "    ", text, flags=re.M).split("\n")
    )


def as_typed(text: str) -> str:
    """A text that names jobs by their scripts, as whoever asks for help types them: those who ask the program have no scripts."""
    return _SCRIPT.sub(lambda match: f"{PROGRAM} {command_name(match[1])}", text) if started().is_program else text


def in_width(line: str, indent: int = 0) -> str:
    """A line in the width of the terminal, 80 columns at most; a command goes on in the next line as a shell takes it.

    What else does not fit goes on behind `indent` columns.
    """
    width = min(shutil.get_terminal_size().columns, _WIDTH)
    if len(line) <= width:
        return line
    if not line.startswith("    "):
        return textwrap.fill(
            line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )
    rows = [""]
    for word in _WORD.findall(line):
        room = width - len("        " + rows[-1] + "  \\")
        rows = [*rows, word] if rows[-1] and len(word) > room else [*rows[:-1], f"{rows[-1]} {word}".strip()]
    return " \\\n        ".join(["    " + rows[0], *rows[1:]])


def more(hidden: int) -> str:
    """The line about flags that are not shown."""
    return f"{hidden} more flags are for experts: --help-all in the place of --help"


def few(settings: type, *, whole: bool = False) -> tuple[type, int]:
    """The settings as tyro is to show them, without what is uncommon unless the `whole` is asked for, and how many flags that leaves out."""
    hints, told = typing.get_type_hints(settings, include_extras=True), _told(settings)
    common = () if whole else getattr(settings, "common", ())
    changed: list[tuple[str, Any, Any]] = []
    hidden = 0
    for field in dataclasses.fields(settings):
        kind = hints[field.name]
        bare, *marks = typing.get_args(kind) if typing.get_origin(kind) is Annotated else [kind]
        if dataclasses.is_dataclass(bare) and isinstance(bare, type):
            inner, left_out = few(bare, whole=whole)
            hidden += left_out
            if inner is not bare:
                changed.append((field.name, _marked(inner, *marks), _field(field, like(field.default, inner))))
        elif common and field.name not in common:
            hidden += 1
            changed.append((field.name, _marked(bare, *marks, tyro.conf.Suppress), _field(field, field.default)))
        elif (text := told.get(field.name, "")) != as_typed(text):
            help_of_it = tyro.conf.arg(help=as_typed(text))
            changed.append((field.name, _marked(bare, *marks, help_of_it), _field(field, field.default)))
    if not changed:
        return settings, 0
    own = {"__doc__": settings.__doc__, "__module__": settings.__module__}
    return dataclasses.make_dataclass(
        settings.__name__, changed, bases=(settings,), frozen=True, kw_only=True, namespace=own
    ), hidden


def _told(settings: type) -> dict[str, str]:
    """The help of flags that name jobs by their scripts: the texts that stand below the fields."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        # One that `few` made, and `object`, have no source.
        with contextlib.suppress(OSError, TypeError):
            body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
            for declared, below in itertools.pairwise(getattr(body, "body", ())):
                if (
                    isinstance(declared, ast.AnnAssign)
                    and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)
                ):
                    found[ast.unparse(declared.target)] = str(below.value.value)
    return {name: text for name, text in found.items() if _SCRIPT.search(text)}


def like(instance: Any, kind: type) -> Any:
    """The same values as settings of a class that `few` made; what is no settings stays as it is."""
    if not dataclasses.is_dataclass(instance) or isinstance(instance, kind):
        return instance
    hints = typing.get_type_hints(kind)
    # Not made anew: what its checks would find is found already.
    same: Any = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value = getattr(instance, field.name)
        inner = hints[field.name]
        is_section = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        object.__setattr__(same, field.name, like(value, inner) if is_section else value)
    return same


def _marked(kind: Any, *marks: Any) -> Any:
    return Annotated[(kind, *marks)] if marks else kind


def _field(field: "dataclasses.Field[Any]", default: Any) -> Any:
    return dataclasses.field(default=default, default_factory=field.default_factory, metadata=field.metadata)
