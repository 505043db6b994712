import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sarm.settings.audit import AuditFeatures, Steer
from sarm.settings.checks import UserError
from sarm.settings.jobs import Pipeline, TrainSae, TrainSarm
from sarm.settings.presets import PRESETS
from sarm.settings.sweep import Ablation
from sarm.settings.sweep_presets import ABLATIONS
from sarm.stages.config_file import as_file, config_flags
from sarm.stages.job import parse


def written(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
def test_what_a_dry_run_prints_is_read_as_the_same_settings(name: str, write: Any, tmp_path: Path) -> None:
    preset = PRESETS[name][1]
    file = written(tmp_path / "run.yaml", write(json.loads(as_file(preset))))
    # From another preset: the file decides everything.
    found = parse(Pipeline, "x", ["tiny" if name != "tiny" else "demo", "--config", file])
    assert as_file(found) == as_file(preset)


@pytest.mark.parametrize("name", ABLATIONS)
def test_so_are_those_of_sweeps(name: str, tmp_path: Path) -> None:
    ablation = ABLATIONS[name][1]
    file = written(tmp_path / "run.json", as_file(ablation))
    other = "tiny" if name != "tiny" else "demo"
    assert as_file(parse(Ablation, "x", [other, "--config", file], ABLATIONS)) == as_file(ablation)


def test_flags_go_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = written(tmp_path / "a.yaml", "sae:\n  k: 4\n  lr: 1e-4\nreward: {head_lr: 0.5, use_margin: false}\n")
    found = parse(TrainSarm, "x", ["tiny", "--sae.k", "6", f"--config={file}", "--reward.use-margin"])
    assert (found.sae.k, found.sae.lr, found.sae.d_sae) == (6, 1e-4, 256)
    assert (found.reward.head_lr, found.reward.use_margin) == (0.5, True)
    assert found.run.config == file


def test_one_file_serves_every_job_of_the_chain(tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", as_file(PRESETS["sarm-1b"][1]))
    assert parse(TrainSae, "x", ["tiny", "--config", file]).sae == PRESETS["sarm-1b"][1].sae


def test_settings_without_presets_have_files_too(tmp_path: Path) -> None:
    content = {"sarm": "/m", "select": ["a"], "target": ["b"], "off_target": ["c", "d"], "fdr": 0.1, "run": {"seed": 3}}
    flags = config_flags(["--config", written(tmp_path / "a.json", content)], AuditFeatures)
    assert flags == ["--sarm=/m", "--select", "a", "--target", "b", "--off-target", "c", "d", "--fdr=0.1", "--seed=3"]


BAD = {
    "unknown key": ("sae: {kk: 3}", "sae.kk is no setting, did you mean k"),
    "unknown section": ("sea: {k: 3}", "sea is no setting, did you mean sae"),
    "no section": ("sae: 3", "sae holds several settings by name, got"),
    "no mapping": ("[1, 2]", "holds no settings by name"),
    "broken": ("sae: {k: ", "neither YAML nor JSON"),
    "nested": ("sae: {k: {a: 1}}", "sae.k cannot be"),
    "code": ("sae: !!python/object/apply:os.system [true]", "sae holds several settings by name"),
    "a start's own": ("run: {supervise: true}", "supervise is said to a job each time"),
    "another's start": ("run: {redo-from: train_sae}", "Pass --redo-from as a flag"),
    "no boolean": ("reward: {topk: maybe}", "reward.topk cannot be"),
    "key": ("run: {mlflow_uri: 'http://user:secret@host'}", "seems to hold a key"),
    "wrong value": ("sae: {k: many}", "--sae.k"),
    "bad value": ("sae: {k: 0}", "k must be between 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, says = BAD[case]
    with pytest.raises(UserError) as error:
        parse(TrainSarm, "x", ["tiny", "--config", written(tmp_path / "a.yaml", content)])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml cannot be read: No such file"):
        parse(TrainSarm, "x", ["tiny", "--config", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="--config needs a file"):
        parse(TrainSarm, "x", ["tiny", "--config"])


def test_without_a_file_there_are_no_flags() -> None:
    assert config_flags(["--name", "x"], Steer) == []


def test_without_a_preset_it_is_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_file(parse(Pipeline, "x", [])) == as_file(PRESETS["demo"][1])
    assert parse(Pipeline, "x", ["--sae.k", "3"]).sae.k == 3
    assert "no preset is named, so this is demo" in capsys.readouterr().err
