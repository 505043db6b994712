"""Axes of an ablation that are settings: `sae.architecture=topk,jumprelu`, each value read as the setting's own flag reads it."""

import contextlib
import dataclasses
import difflib
import functools
import io
import types
import typing
from typing import Annotated, Any, Literal

import tyro

from sarm.settings.checks import UserError
from sarm.settings.jobs import Pipeline

SECTIONS = ("model", "extraction", "sae", "reward", "evaluation")
# Settings that the sweep's named axes decide, and the flag of each.
_NAMED = {
    "model.layer": "layers",
    "extraction.layers": "layers",
    "sae.d_sae": "widths",
    "sae.k": "ks",
    "reward.encoder": "components",
    "reward.baselines": "components",
    "reward.token_sae": "components",
    "run.seed": "seeds",
    "seed": "seeds",
}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """A dotted setting and the values that it takes."""

    name: str
    values: tuple[Any, ...]

    def of(self, config: Any) -> Any:
        """The setting's value in a job's settings."""
        section, _, field = self.name.partition(".")
        return getattr(getattr(config, section), field)

    @property
    def is_numeric(self) -> bool:
        """Whether tables have numbers of it rather than text."""
        return all(type(value) in (int, float) for value in self.values)

    def shown(self, value: Any) -> float | str:
        """A value as tables have it."""
        return value if self.is_numeric else text_of(value)


def text_of(value: Any) -> str:
    """A setting's value in one word, the items of several joined by +."""
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


@functools.cache
def axes_of(texts: tuple[str, ...]) -> tuple[Axis, ...]:
    """The axes that `--sweep.axes` names.

    Raises UserError for what is no setting, is decided by another axis or changes no result, and for values that it cannot have.
    """
    axes: list[Axis] = []
    for text in texts:
        typed, has_values, values = text.partition("=")
        name = typed.strip().removeprefix("--").replace("-", "_")
        if not has_values or not name:
            raise UserError(f"--sweep.axes takes SETTING=VALUE,VALUE, got {text!r}. Pass e.g. sae.architecture=topk,jumprelu.")  # fmt: skip
        hint = _type_of(name)
        if any(axis.name == name for axis in axes):
            raise UserError(f"--sweep.axes has {name} twice. Pass it once, with all its values.")
        axis = Axis(name, tuple(_value(name, hint, one.strip()) for one in values.split(",")))
        if len(set(axis.values)) < len(axis.values):
            raise UserError(f"--sweep.axes {text} has a value twice: cells would be repeated. Pass each once.")
        axes.append(axis)
    return tuple(axes)


@functools.cache
def _settings() -> dict[str, tuple[Any, bool]]:
    """Type of every setting that a cell could have of its own, and whether it is operational."""
    sections = typing.get_type_hints(Pipeline)
    return {
        f"{section}.{field.name}": (
            typing.get_type_hints(sections[section])[field.name],
            "operational" in field.metadata,
        )
        for section in SECTIONS
        for field in dataclasses.fields(sections[section])
    }


def _type_of(name: str) -> Any:
    if name in _NAMED:
        raise UserError(f"{name} has an axis of its own. Pass --sweep.{_NAMED[name]} instead of --sweep.axes {name}=...")  # fmt: skip
    if name not in _settings():
        # A bare name may stand in several sections: all of them are meant.
        guesses = [known for known in _settings() if known.partition(".")[2] == name]
        guesses = guesses or difflib.get_close_matches(name, _settings(), 1)
        hint = f" Did you mean {' or '.join(guesses)}?" if guesses else ""
        raise UserError(f"--sweep.axes: {name} is no setting of {', '.join(SECTIONS)}.{hint}")
    hint, is_operational = _settings()[name]
    if is_operational:
        raise UserError(f"--sweep.axes: {name} says how a job runs, not what comes out, so its cells would be one. Pass --{name.replace('_', '-')}.")  # fmt: skip
    return hint


def _value(name: str, hint: Any, text: str) -> Any:
    holder = dataclasses.make_dataclass("Holder", [("value", Annotated[hint, tyro.conf.FlagConversionOff])])
    if typing.get_origin(hint) is tuple:
        arguments = ["--value", *text.split()]
    else:
        # Joined, so that a text that begins with dashes stays a value.
        arguments = [f"--value={text.capitalize() if hint is bool else text}"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            if text:
                return tyro.cli(holder, args=arguments).value
    except SystemExit:
        pass
    guess = difflib.get_close_matches(text, map(str, _choices(hint)), 1)
    raise UserError(
        f"--sweep.axes: {name} cannot be {text!r}. It is {_kind(hint)}.{f' Did you mean {guess[0]}?' if guess else ''}"
    )


def _choices(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return tuple(choice for part in typing.get_args(hint) for choice in _choices(part))


def _kind(hint: Any) -> str:
    """What values a type has, in words."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if typing.get_origin(hint) is tuple:
        return f"one or more values with spaces between them, each {_kind(parts[0])}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("None" if part is type(None) else _kind(part) for part in parts)
    return _KINDS.get(hint, "a text")
