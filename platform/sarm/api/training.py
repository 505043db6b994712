"""`sarm.train`: what `sarm train-sarm` does, with settings as Python values."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sarm.api.reward_model import RewardModel, load
from sarm.settings.checks import UserError
from sarm.settings.extras import need
from sarm.settings.jobs import TrainSarm
from sarm.settings.presets import PRESETS

# What is said to the program that starts a job, which here is yours.
_OF_A_COMMAND = ("config", "dry_run", "json", "submit", "supervise", "debug")


def train(
    preset: str = "demo", *, out: str | Path | None = None, seed: int = 0, **settings: Mapping[str, Any]
) -> RewardModel:
    """Train a SARM, with every stage that it needs, and load it.

    `preset` is one that `sarm train-sarm --help` lists. `settings` are those of its flags, a mapping for each section:
    `data={"pairs": ["pairs.jsonl"]}, sae={"k": 27}, run={"num_workers": 2}`. `out` is the folder of the run (`outputs/PRESET` if None); what is finished
    there is not done again, and an interrupted training goes on. Raises UserError for unknown presets and settings, for folders that were made
    with other settings, and where the training extra is not installed, before anything is paid for.
    """
    config = configured(preset, out=out, seed=seed, **settings)
    need("train")
    # Seconds of imports, that who is refused need not wait for.
    from sarm.engine.results import kept
    from sarm.stages.chain import run_chain

    with kept(config):
        run_chain(config)
    return load(config.run.out / "sarm")


def configured(
    preset: str = "demo", *, out: str | Path | None = None, seed: int = 0, **settings: Mapping[str, Any]
) -> TrainSarm:
    """The settings of `train`, checked. Raises UserError as it does."""
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}{_meant(preset, PRESETS)} Known are {', '.join(PRESETS)}.")
    config = PRESETS[preset][1].part(TrainSarm)
    run = {"seed": seed, **({} if out is None else {"out": Path(out)})}
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, values in settings.items():
        if name not in sections:
            raise UserError(f"there is no section {name!r} of settings{_meant(name, sections)} Known are {', '.join(sections)}.")  # fmt: skip
        if not isinstance(values, Mapping):
            raise UserError(f"{name} is {values!r}, expected its settings by name. Pass {name}={{NAME: VALUE}}.")
    changed = {
        name: _with(section, name, {**(run if name == "run" else {}), **settings.get(name, {})})
        for name, section in sections.items()
    }
    return TrainSarm(**changed)


def _with(section: Any, name: str, values: Mapping[str, Any]) -> Any:
    known = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    kinds = typing.get_type_hints(type(section))
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}{_meant(key, known)} Known are {', '.join(known)}.")
        if name == "run" and key in _OF_A_COMMAND:
            raise UserError(f"run[{key!r}] does nothing here, it is for commands alone. Leave it out, or use sarm train-sarm.")  # fmt: skip
        if isinstance(known[key], tuple) and isinstance(value, str | Path):
            raise UserError(f"{name}[{key!r}] is a list, got {str(value)!r}. Pass [{str(value)!r}].")
        plain[key] = _as(kinds[key], value, f"{name}[{key!r}]")
    return dataclasses.replace(section, **plain)


def _as(kind: Any, value: Any, where: str) -> Any:
    """A value as a flag's text would have become it: a number of a text, a tuple of a list. Raises UserError for what is no such value."""
    try:
        return TypeAdapter(kind).validate_python(_texts_of_paths(value))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise UserError(f"{where} cannot be {value!r}: {reason[:1].lower()}{reason[1:]}.") from error


def _texts_of_paths(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_texts_of_paths(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _meant(name: str, known: Mapping[str, Any]) -> str:
    guess = difflib.get_close_matches(name, known, 1)
    return f", did you mean {guess[0]!r}?" if guess else "."
