"""What is refused about an output folder before any work is done."""

import shutil
import socket
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from sarm.engine.results import check_place, check_room, check_shared, kept, least_bytes
from sarm.settings.audit import Relabel, Steer
from sarm.settings.benchmarks import Benchmarking, Comparison
from sarm.settings.checks import UserError
from sarm.settings.jobs import ExtractActivations, Pipeline, PrepareData
from sarm.settings.judging import HumanRatings, Interpret
from sarm.settings.presets import PRESETS
from sarm.settings.run import ChainSettings, RunSettings


def test_a_folder_that_ray_deletes_or_nobody_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="inside the package that Ray has unpacked"):
        check_place(RunSettings(out=tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1/outputs/x"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made: .*/file is not a folder"):
        check_place(RunSettings(out=tmp_path / "file" / "x"))
    monkeypatch.setenv("SARM_RESULTS", "somewhere")
    with pytest.raises(UserError, match="SARM_RESULTS must be an absolute folder, got 'somewhere'"):
        check_place(RunSettings(out=tmp_path / "x"))


def test_a_disk_without_room_for_what_is_known_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = PRESETS["demo"][1]
    config: Pipeline = replace(demo, run=RunSettings(out=tmp_path / "deep" / "out"))
    # 576 wide, two matrices, 28 bytes a parameter: the weights, and two states of weights and moments.
    assert least_bytes(config) == 100_000_000 + 28 * 2 * 576 * demo.sae.d_sae
    usage = namedtuple("usage", "total used free")
    free = least_bytes(config) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free))
    with pytest.raises(UserError, match=r"GB free, and this job writes at least 0\.\d\d GB to .*/deep/out"):
        check_room(config)
    free += 1
    check_room(config)


def node(cpus: float) -> dict[str, object]:
    return {"Alive": True, "NodeManagerAddress": "10.0.0.1", "NodeID": "1", "Resources": {"CPU": cpus} if cpus else {}}


def test_a_head_alone_says_nothing_about_the_nodes_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0123"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.delenv("SARM_RESULTS", raising=False)
    run = RunSettings(out=Path("outputs/demo"))
    monkeypatch.setattr(ray, "nodes", lambda: [node(0)])
    with pytest.raises(UserError, match=r"nothing says that they share ~/sarm-outputs\. Set SARM_RESULTS"):
        check_shared(run, 1)
    check_shared(RunSettings(out=tmp_path / "stated"), 1)
    monkeypatch.setattr(ray, "nodes", lambda: [node(2)])
    check_shared(run, 1)


def test_several_nodes_need_a_folder_that_all_see_and_a_server(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"2 nodes, and sqlite:.* is a file on one of them. Pass --mlflow-uri"):
        check_shared(RunSettings(out=tmp_path / "out"), 2)
    run = RunSettings(out=tmp_path / "out", mlflow_uri="http://mlflow:5000")
    check_shared(run, 2)
    assert list(tmp_path.iterdir()) == [], "and nothing stays of the look"
    monkeypatch.setattr(Path, "touch", lambda path: None)
    with pytest.raises(UserError, match=r"is not the same folder on .*: results would be scattered"):
        check_shared(run, 2)


def test_a_submitted_job_says_where_its_results_are_before_and_after(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRESETS["tiny"][1], run=RunSettings(out=tmp_path / "out"))
    with kept(config):
        pass
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "r1"}}')
    with kept(config):
        print("work")
    first, link, work, *last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"results  {tmp_path}/out on ")
    assert link == f"mlflow   make ui OUTPUTS={tmp_path}"
    assert (work, last) == ("work", [first, link])


def test_a_job_that_needs_no_cluster_joins_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    run, folder = RunSettings(out=tmp_path / "out"), tmp_path / "of-another"
    prepare = replace(PRESETS["tiny"][1].part(PrepareData), run=ChainSettings(out=run.out))
    comparison = Comparison(run_a=folder, run_b=folder, run=run)
    for config in (
        prepare,
        comparison,
        Interpret(contexts=folder, run=run),
        HumanRatings(explanations=folder, sheet=tmp_path / "sheet.csv", run=run),
        Steer(run=run),
        Relabel(run=run),
    ):
        with kept(config):
            pass
    training = replace(PRESETS["tiny"][1].part(ExtractActivations), run=ChainSettings(out=run.out))
    for jobs in ((training,), (Benchmarking(model="x", benchmarks=("pairs=x",), run=run),), (comparison, training)):
        with pytest.raises(UserError, match="no Ray cluster at"), kept(*jobs):
            pass
