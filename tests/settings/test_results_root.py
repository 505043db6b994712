"""Where relative output folders stand: beside the command, or outside of what Ray unpacks and deletes."""

from pathlib import Path

import pytest

from sarm.settings.results_root import absolute_in, is_in_package, submitted_as
from sarm.settings.run import RunSettings


def test_a_relative_out_stands_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SARM_RESULTS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert RunSettings(out=Path("outputs/demo")).out == tmp_path / "outputs/demo"


def test_inside_a_package_of_ray_it_stands_in_the_home_folder(in_package: Path, tmp_path: Path) -> None:
    assert is_in_package(in_package)
    assert RunSettings(out=Path("outputs/demo")).out == tmp_path / "home/sarm-outputs/demo"
    assert RunSettings(out=Path("mine")).out == tmp_path / "home/sarm-outputs/mine"
    assert RunSettings(out=Path("/shared/mine")).out == Path("/shared/mine")


def test_the_environment_says_where_else(in_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARM_RESULTS", "/shared/team")
    assert RunSettings(out=Path("outputs/demo")).out == Path("/shared/team/demo")
    assert RunSettings(out=Path("outputs")).out == Path("/shared/team/outputs"), "a folder of its own, beside MLflow's"
    monkeypatch.chdir(tmp_path)
    assert RunSettings(out=Path("outputs/demo")).out == Path("/shared/team/demo"), "for every job, submitted or not"


def test_a_submitted_job_knows_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert submitted_as() == ""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}, "metadata": {"job_submission_id": "r1"}}')
    assert submitted_as() == "r1"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}}')
    assert submitted_as() == ""


def test_what_a_submitted_job_reads_of_outputs_lies_where_its_results_do(in_package: Path, tmp_path: Path) -> None:
    assert absolute_in(Path("outputs/demo/sarm")) == tmp_path / "home/sarm-outputs/demo/sarm"
    assert absolute_in(Path("outputs")) == tmp_path / "home/sarm-outputs"
    assert absolute_in(Path("chat.jsonl")) == in_package / "chat.jsonl"
