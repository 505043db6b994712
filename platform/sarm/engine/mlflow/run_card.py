"""What a reader of MLflow's list sees of a run: who made it from what, its telling parameters, its data sets, and a sentence about it.

Plain values, made without MLflow, which takes a second to import.
"""

import dataclasses
import functools
import getpass
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sarm.contracts.folders import CORPUS_FOLDER, PAIRS_FOLDER
from sarm.contracts.manifest import Manifest, git_commit
from sarm.contracts.untrusted import holds_a_secret
from sarm.settings.identity import as_json
from sarm.settings.presets import PRESETS
from sarm.settings.started import started

# MLflow's own names of tags: its list shows them as User, Source, Version and Description.
USER, SOURCE_NAME, SOURCE_TYPE = "mlflow.user", "mlflow.source.name", "mlflow.source.type"
COMMIT, NOTE = "mlflow.source.git.commit", "mlflow.note.content"

# What MLflow's list and its comparison call a setting, and where it stands in a job's config. The comparison sorts by name, and its plot
# starts with the first three that differ: width, k and layer come first, then the rates. None of them may be an operational setting: a run whose values differ is another run.
_SETTINGS = {
    "model": "model.name",
    "layer": "model.layer",
    "d_sae": "sae.d_sae",
    "k": "sae.k",
    "lr_sae": "sae.lr",
    "lr_sae_chat": "sae.chat_lr",
    "sae_batch": "sae.batch_size",
    "sae_architecture": "sae.architecture",
    "lr_reward": "reward.lr",
    "lr_head": "reward.head_lr",
    "reward_head_init": "reward.head_init",
    "reward_epochs": "reward.epochs",
    "reward_batch": "reward.batch_pairs",
    "texts": "data.texts",
    "pairs": "data.pairs",
    "seed": "run.seed",
}
# A sweep has these instead of one layer, width, k and seed.
_AXES = {name: f"sweep.{name}" for name in ("layers", "widths", "ks", "components", "seeds")}
_OF_ONE = ("layer", "d_sae", "k", "seed")
_SOURCES_SHOWN = 100


class DataSet(NamedTuple):
    """A finished folder of data as MLflow lists it; `digest` identifies its bytes, `profile` is JSON."""

    name: str
    digest: str
    source_type: str
    source: str
    profile: str
    context: str


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """The few settings by which runs are told apart, of the config of any job; those that the job does not have are left out.

    A config without any of them (a benchmark's, a comparison's) is small: it is taken whole, but for `run`.
    """
    names = {name: path for name, path in _SETTINGS.items() if "sweep" not in config or name not in _OF_ONE}
    names |= _AXES if "sweep" in config else {}
    # Most sweeps have the named axes alone.
    names |= {"axes": "sweep.axes"} if _at(config, "sweep.axes") else {}
    found = {name: _at(config, path) for name, path in names.items()}
    if _at(config, "sae.recipe") == "turn_ends":
        # It has one phase.
        found.pop("lr_sae_chat", None)
        found["sae_recipe"] = f"turn_ends, reward share {_at(config, 'sae.reward_share'):g}"
    if all(value is None for name, value in found.items() if name not in ("seed", "pairs")):
        return {key: _text(value) for key, value in flat_params(config).items() if not key.startswith("run.")}
    return {name: _text(value) for name, value in found.items() if value is not None}


def identifying(config: Any) -> dict[str, str]:
    """`parameters` of a job's config object without its operational settings, which do not make another run of it."""
    return parameters(_without_operational(config, json.loads(as_json(config))))


def _without_operational(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    kept = [field for field in dataclasses.fields(config) if not field.metadata.get("operational")]
    return {
        field.name: _without_operational(part, values[field.name])
        if dataclasses.is_dataclass(part)
        else values[field.name]
        for field in kept
        for part in [getattr(config, field.name)]
    }


def flat_params(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config values under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flat_params(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def origin() -> dict[str, str]:
    """Tags that say who started the run, with which script and command, of which preset, from which commit."""
    program, arguments = started(), sys.argv[1:]
    is_script = program.typed[0] == "python"
    source = (_relative(program.source) if is_script else program.source) or "python"
    # A secret on a command line is refused by jobs; this one may be somebody else's.
    command = (
        ""
        if any(holds_a_secret(one) for one in arguments)
        else shlex.join([*(["python", source] if is_script else program.typed), *arguments])
    )
    tags = {USER: _user(), SOURCE_NAME: source, SOURCE_TYPE: "LOCAL", COMMIT: _commit(), "command": command[:5000]}
    preset = arguments[0] if arguments and arguments[0] in PRESETS else ""
    return {key: value for key, value in {**tags, "preset": preset}.items() if value}


def description(settings: Mapping[str, Any], tags: Mapping[str, str], figures: str = "") -> str:
    """A few sentences in Markdown: what the run is made of (`parameters`), its figures if it has any, the command (`origin`)."""
    parts = []
    if "layers" in settings:
        parts.append(
            f"Ablation of **{settings['model']}**: layers {settings['layers']}, widths {settings['widths']} x d_in, k {settings['ks']}, components {settings['components']}{', ' * ('axes' in settings)}{settings.get('axes', '')}."
        )
    elif "model" in settings and "layer" in settings:
        preset = f"Preset {tags['preset']}: " if "preset" in tags else ""
        dictionary = (
            f", {int(settings['d_sae']):,} latents, {settings['k']} active" if int(settings.get("d_sae") or 0) else ""
        )
        parts.append(f"{preset}**{settings['model']}** at layer {settings['layer']}{dictionary}.")
    parts += [figures] * bool(figures)
    parts += [f"`{tags['command']}`"] if tags.get("command") else []
    return "\n\n".join(parts)


def data_set(manifest: Manifest) -> DataSet | None:
    """The data set that a finished folder is; None for folders of something else."""
    if manifest.schema not in (CORPUS_FOLDER, PAIRS_FOLDER):
        return None
    is_corpus = manifest.schema == CORPUS_FOLDER
    sources = list(manifest.config.get("texts" if is_corpus else "pairs") or [])
    name = ", ".join(sources) or manifest.schema
    name = name if len(name) <= _SOURCES_SHOWN else f"{name[: _SOURCES_SHOWN - 1]}…"
    digest = hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()[:12]
    profile = {key: manifest.counts[key] for key in ("rows", "splits", "prompts") if key in manifest.counts}
    if len(sources) == 1 and sources[0].startswith("hf:"):
        kind, source = "hf", {"path": re.split("[:@]", sources[0].removeprefix("hf:"))[0]}
    else:
        kind, source = "local", {"uri": ", ".join(sources)}
    return DataSet(
        name=name,
        digest=digest,
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps(profile),
        context="corpus" if is_corpus else "pairs",
    )


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else str(value)


def _relative(script: str) -> str:
    """The script under the folder of the checkout that holds it, or its name alone."""
    path = Path(script).absolute()
    parents: list[Path] = [folder for folder in path.parents if (folder / "pyproject.toml").exists()]
    return path.relative_to(parents[0]).as_posix() if parents else path.name


def _user() -> str:
    """Whose run it is; a container's user may have no name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


@functools.cache
def _commit() -> str:
    commit = git_commit()
    return "" if commit == "unknown" else commit
