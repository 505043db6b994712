"""Settings in a file: what `--dry-run --json` prints, in JSON or YAML, as the flags that it stands for."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from sarm.contracts.untrusted import MAX_JSON_BYTES, holds_a_secret
from sarm.settings.checks import UserError
from sarm.settings.identity import as_json
from sarm.settings.jobs import Pipeline, PrepareData
from sarm.settings.results_root import text_in
from sarm.settings.run import Flat, RunSettings

FLAG = "--config"
_OF_THIS_START = ("config", "dry_run", "json", "submit", "supervise", "debug", "only", "redo_from")
# Sections that single jobs of the chain have besides.
_OF_SOME_JOBS = {"also", "sweep"}
_NOTHING, _YES_OR_NO = ("null", "~", "none", ""), {"true": True, "false": False}
_MAX_BYTES = min(MAX_JSON_BYTES, 1 << 20)


def config_flags(arguments: Sequence[str], config_type: type) -> list[str]:
    """The flags that the file of `--config` stands for, to be put before those of the command line; none without such a file.

    Raises UserError for a file that cannot be read, and for a key that is no setting of this job or of the whole chain.
    """
    path = _path_in(arguments)
    if path is None:
        return []
    return _flags(_read(path), config_type, "", str(path))


def as_file(config: Any) -> str:
    """A job's settings as JSON, without what only this start of it was told; `--config` reads them again."""
    known = {field.name: field.default for field in dataclasses.fields(config.run)}
    run = dataclasses.replace(config.run, **{name: known[name] for name in _OF_THIS_START if name in known})
    return as_json(dataclasses.replace(config, run=run))


def _path_in(arguments: Sequence[str]) -> Path | None:
    for place, argument in enumerate(arguments):
        name, is_joined, value = argument.partition("=")
        if name == FLAG:
            value = value if is_joined else "".join(arguments[place + 1 : place + 2])
            if not value or value.startswith("--"):
                raise UserError(f"{FLAG} needs a file. Pass {FLAG} FILE, of what --dry-run --json prints.")
            return Path(text_in(value)).expanduser()
    return None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{FLAG} {path} has more than {_MAX_BYTES:,} bytes. Pass a file of settings.")
        # Every value stays the text that it is in the file, as on a command line: YAML would make 42798 of 0123456, and "no" a boolean.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"{FLAG} {path} cannot be read: {error.strerror}. Pass a file of settings.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{FLAG} {path} is neither YAML nor JSON: {reason}.") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{FLAG} {path} holds no settings by name. Pass what --dry-run --json prints.")
    return content


def _flags(content: Mapping[Any, Any], section: type, prefix: str, path: str) -> list[str]:
    fields = {field.name for field in dataclasses.fields(section)}
    # The whole chain's settings are in one file for all its jobs: each takes what it knows.
    is_chain = issubclass(section, PrepareData)
    others = {field.name for field in dataclasses.fields(Pipeline)} | _OF_SOME_JOBS if is_chain else set()
    hints = typing.get_type_hints(section, include_extras=True)
    flags: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in fields:
            if name in others:
                continue
            guess = difflib.get_close_matches(name, fields | others, 1)
            hint = f", did you mean {guess[0]}?" if guess else f", there are {', '.join(sorted(fields))}."
            raise UserError(f"{FLAG} {path}: {prefix}{key} is no setting{hint}")
        if issubclass(section, RunSettings) and name in _OF_THIS_START:
            if str(value).lower() not in (*_NOTHING, "false"):
                raise UserError(f"{FLAG} {path}: {key} is said to a job each time, not kept in a file. Pass --{name.replace('_', '-')} as a flag.")  # fmt: skip
            continue
        inner, marks = _unwrapped(hints[name])
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, Mapping):
                raise UserError(f"{FLAG} {path}: {prefix}{key} holds several settings by name, got {value!r}.")
            flags += _flags(value, typing.cast(type, inner), prefix if Flat in marks else f"{prefix}{key}.", path)
        else:
            flag = f"--{prefix}{name}".replace("_", "-")
            own = _of_value(flag, value, inner, is_positional=tyro.conf.Positional in marks)
            if own is None:
                raise UserError(f"{FLAG} {path}: {prefix}{key} cannot be {value!r}.")
            flags += own
    return flags


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if typing.get_origin(hint) is Annotated:
        inner, *marks = typing.get_args(hint)
        return inner, tuple(marks)
    return hint, ()


def _of_value(flag: str, value: Any, hint: Any, *, is_positional: bool) -> list[str] | None:
    """A setting as it is typed; None for what no flag can say."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        return None
    if any(holds_a_secret(text) for text in values):
        raise UserError(f"the value of {flag} in the file of {FLAG} seems to hold a key or a password. Set it in the environment.")  # fmt: skip
    if is_positional or isinstance(value, list):
        return values if is_positional else [flag, *values]
    if hint is bool:
        if value.lower() not in _YES_OR_NO:
            return None
        head, dot, last = flag.removeprefix("--").rpartition(".")
        return [flag if _YES_OR_NO[value.lower()] else f"--{head}{dot}no-{last}"]
    if value.lower() in _NOTHING and type(None) in typing.get_args(hint):
        value = "None"
    # Joined, so that a text that begins with dashes stays a value.
    return [f"{flag}={value}"]
