"""Every setting that may name a path is marked as one, and a marked one stands where results do in a submitted job."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sarm.settings
from sarm.engine.mlflow.ui import Ui
from sarm.settings.audit import Steer
from sarm.settings.data import DataSettings
from sarm.settings.model import ModelSettings
from sarm.settings.results_root import text_in
from sarm.stages.config_file import config_flags

ROOT = Path(__file__).parents[2]
# Texts that name no path. A new text is marked READ or WRITTEN, or is listed here. A chat template is read as the setting is made, and
# is its text from there on.
NO_PATH = {
    "RunSettings": {"mlflow_uri", "experiment", "ray_address", "submit"},
    "Ui": {"mlflow_uri", "experiment"},
    "ModelSettings": {"revision", "gguf_file", "system_prompt", "chat_template"},
    "DataSettings": {"text_field", "columns"},
    "ColumnNames": {"text_field", "columns"},
    "Template": {"revision", "system_prompt", "chat_template"},
    "Benchmarking": {"revision", "probes", "head", "chat_template"},
    "Debias": {"revision", "head", "chat_template"},
    "DebiasSettings": {"properties", "ranks", "trigger"},
    "Judging": {"judges", "prices", "reasoning_effort"},
    "JudgeSpec": {"model", "base_url", "api_version"},
    "RewardCard": {"prompt", "response"},
    "ConvertSae": {"head"},
    "Steer": {"name", "over_refusal", "undo"},
    "Relabel": {"write"},
    "Push": {"hub", "licence"},
    "Axis": {"name"},
    "SweepSettings": {"axes"},
    "Serving": {"name", "host", "mlflow_uri", "experiment", "ray_address"},
}


def settings_classes() -> list[type]:
    modules = [importlib.import_module(f"sarm.settings.{module.name}") for module in pkgutil.iter_modules(sarm.settings.__path__)]  # fmt: skip
    own = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return sorted({Ui, *filter(dataclasses.is_dataclass, own)}, key=lambda declared: declared.__name__)


def kinds(hint: Any) -> set[type]:
    """Path and str, as far as a value of the type may be one or hold one; fixed words are neither."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return set()
    return {hint} & {Path, str} if not inner else set().union(*map(kinds, inner))


def declared_in(settings: type, name: str) -> str:
    """The first class that declares the field."""
    return [base.__name__ for base in settings.__mro__ if name in inspect.get_annotations(base)][-1]


def fields_by_mark() -> Iterator[tuple[str, str, set[type], str | None]]:
    for settings in settings_classes():
        hints = typing.get_type_hints(settings)
        for field in dataclasses.fields(settings):
            yield declared_in(settings, field.name), field.name, kinds(hints[field.name]), field.metadata.get("path")


def test_every_setting_that_may_name_a_path_is_marked() -> None:
    for settings, name, held, mark in fields_by_mark():
        is_listed = name in NO_PATH.get(settings, set())
        assert not (Path in held and mark is None), f"{settings}.{name} is a path: mark it READ or WRITTEN"
        assert not (str in held and (mark is None) != is_listed), f"{settings}.{name}: mark it, or list it in NO_PATH"
        assert mark is None or held, f"{settings}.{name} holds no path"


def test_every_job_s_settings_are_among_those_walked() -> None:
    started = {
        name
        for module in ROOT.glob("platform/sarm/commands/*.py")
        for name in re.findall(r"settings=(\w+),", module.read_text())
    }
    assert len(started) > 15
    assert started <= {settings.__name__ for settings in settings_classes()}


# What the checks of a class ask for, in place of the examples; a class that cannot have all its paths at once has several.
GIVEN: dict[str, tuple[dict[str, Any], ...]] = {
    "RewardSettings": ({"baselines": ("token_sae",)},),
    "Judging": ({"keys": ("localhost=file:outputs/demo/keys",)},),
    "Debias": ({"contrasts": ("tone=outputs/demo/contrasts",)},),
    "AuditFeatures": ({"off_target": ("rm_bench=outputs/demo/off_target",)},),
    "Serving": ({"variants": ("edited=outputs/demo/variants",), "token": "file:outputs/demo/token"},),
    "HumanRatings": ({"sheet": None}, {"filled": ()}),
}


def example(hint: Any, name: str) -> Any:
    """A value of a marked setting: something in `outputs`, by the setting's name."""
    text = f"outputs/demo/{name}"
    value = Path(text) if Path in kinds(hint) else text
    return (value,) if typing.get_origin(hint) is tuple else value


def test_every_marked_setting_stands_where_results_do_in_a_submitted_job(in_package: Path, tmp_path: Path) -> None:
    demo = tmp_path / "home" / "sarm-outputs" / "demo"
    marks = {settings: [f.name for f in dataclasses.fields(settings) if "path" in f.metadata] for settings in settings_classes()}  # fmt: skip
    for settings in filter(marks.get, marks):
        hints = typing.get_type_hints(settings)
        examples = {name: example(hints[name], name) for name in marks[settings]}
        for given in GIVEN.get(settings.__name__, ({},)):
            made = settings(**{**examples, **given})
            for name in (name for name in examples if given.get(name, True)):
                value = getattr(made, name)
                (shown,) = value if isinstance(value, tuple) else (value,)
                assert str(shown).endswith(f"{demo / name}"), (settings.__name__, name, shown)


def test_a_path_in_a_text_is_found_behind_its_name_and_nothing_else_is_touched(
    in_package: Path, tmp_path: Path
) -> None:
    root = tmp_path / "home" / "sarm-outputs"
    assert text_in("outputs/demo/pairs:train") == f"{root}/demo/pairs:train"
    assert text_in("rm_bench=outputs/chat-*.jsonl") == f"rm_bench={root}/chat-*.jsonl"
    assert text_in("localhost:8000=file:outputs/key") == f"localhost:8000=file:{root}/key"
    assert text_in("outputs/score.py:reward") == f"{root}/score.py:reward"
    for text in ("hf:owner/outputs", "demo:harm", "", "/data/outputs/x", "rm_bench=chat.jsonl", "HOST=env:outputs"):
        assert text_in(text) == text


def test_elsewhere_texts_stay_as_they_were_typed_since_stages_are_identified_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SARM_RESULTS", raising=False)
    assert DataSettings(pairs=("outputs/mine.jsonl",)).pairs == ("outputs/mine.jsonl",)
    assert ModelSettings(name="outputs/model").name == "outputs/model"


def test_a_config_file_in_outputs_is_found_there(in_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "sarm-outputs"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("name: doubled\n")
    assert config_flags(["--config", "outputs/mine.yaml"], Steer) == ["--name=doubled"]


def test_a_chat_template_in_outputs_is_read_there(in_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "sarm-outputs" / "demo"
    folder.mkdir(parents=True)
    (folder / "own.jinja").write_text("{{ messages }}")
    assert ModelSettings(chat_template="outputs/demo/own.jinja").chat_template == "{{ messages }}"
