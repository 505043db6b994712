"""`sarm.train`: what `sarm train-sarm` does, with settings as Python values."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sarm.api.reward_model import RewardModel, load
from sarm.settings.checks import UserError
from sarm.settings.extras import need
from sarm.settings.jobs import TrainSarm
from sarm.settings.presets import PRESETS


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
    for name in settings:
        if name not in sections:
            raise UserError(f"there is no section {name!r} of settings{_meant(name, sections)} Known are {', '.join(sections)}.")  # fmt: skip
    changed = {
        name: _with(section, name, {**(run if name == "run" else {}), **settings.get(name, {})})
        for name, section in sections.items()
    }
    return TrainSarm(**changed)


def _with(section: Any, name: str, values: Mapping[str, Any]) -> Any:
    known = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}{_meant(key, known)} Known are {', '.join(known)}.")
        if isinstance(known[key], tuple) and isinstance(value, str):
            raise UserError(f"{name}[{key!r}] is a list, got the string {value!r}. Pass [{value!r}].")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return dataclasses.replace(section, **plain)


def _meant(name: str, known: Mapping[str, Any]) -> str:
    guess = difflib.get_close_matches(name, known, 1)
    return f", did you mean {guess[0]!r}?" if guess else "."
