import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from tests.stages.random_sarm import random_sarm

from sarm.commands import relabel, steer
from sarm.contracts.manifest import git_commit
from sarm.engine.mlflow.outbox import close_all
from sarm.engine.mlflow.run_card import DataSet
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.mlflow.tracking import StageRun, tracking_uri
from sarm.engine.ray.training_progress import Progress
from sarm.engine.session import Session, open_session
from sarm.settings.audit import AuditFeatures, Relabel, Steer
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings
from sarm.stages import relabel as relabelling
from sarm.stages import steer as steering


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_db: Path) -> RunSettings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "outputs").mkdir()
    shutil.copy(mlflow_db, tmp_path / "outputs" / "mlflow.db")
    return RunSettings(out=tmp_path / "outputs" / "a")


def test_stages_are_children_of_one_parent_and_close_as_they_end(run: RunSettings) -> None:
    tracker = Tracker(run, "a")
    with tracker.stage("good", None, {"k": 3}) as good:
        good.log_metrics({"fvu": 0.5, "broken": math.inf, "missing": None}, step=2)
    with pytest.raises(RuntimeError, match="boom"), tracker.stage("bad", None, {}) as bad:
        raise RuntimeError("boom")
    client = MlflowClient(tracker.uri)
    found = client.get_run(good.run_id)
    assert found.data.tags["mlflow.parentRunId"] == tracker.parent.run_id
    assert found.info.status == "FINISHED"
    assert found.data.params == {"k": "3"}
    assert found.data.metrics == {"fvu": 0.5}
    assert client.get_run(bad.run_id).info.status == "FAILED"


def test_a_restart_continues_under_the_same_ids(run: RunSettings) -> None:
    first = Tracker(run, "a")
    with pytest.raises(RuntimeError), first.stage("s", None, {"k": 3}) as child:
        raise RuntimeError
    again = Tracker(run, "a", first.parent.run_id)
    with again.stage("s", child.run_id, {"k": 3, "new": 1}) as continued:
        pass
    assert again.parent.run_id == first.parent.run_id
    assert continued.run_id == child.run_id
    assert MlflowClient(again.uri).get_run(child.run_id).data.params == {"k": "3", "new": "1"}


def test_an_id_of_another_database_gets_a_new_run(run: RunSettings) -> None:
    tracker = Tracker(run, "a", "0" * 32)
    assert tracker.parent.run_id != "0" * 32


def test_artifacts_lie_beside_the_database_and_not_in_the_working_directory(run: RunSettings, tmp_path: Path) -> None:
    tracker = Tracker(run, "a")
    tracker.parent.log_text("hello", "note.txt")
    tracker.parent.log_table([{"name": "SARM", "accuracy": 0.9}], "table.json")
    assert list((tmp_path / "outputs" / "mlartifacts").rglob("note.txt"))
    (table,) = (tmp_path / "outputs" / "mlartifacts").rglob("table.json")
    assert json.loads(table.read_text())["data"] == [["SARM", 0.9]]


def test_a_run_registers_its_model_once_and_other_runs_later_versions(
    run: RunSettings, tmp_path: Path, tiny_folder: Path, tiny_chat
) -> None:
    tracker = Tracker(run, "a")
    folder = random_sarm(tmp_path / "sarm", tiny_folder, tiny_chat)
    for _ in range(2):
        tracker.parent.register_model(folder, "sarm-demo", "reference")
    Tracker(run, "b").parent.register_model(folder, "sarm-demo", "reference")
    client = MlflowClient(tracker.uri)
    versions = client.search_model_versions("name = 'sarm-demo'")
    assert sorted(int(version.version) for version in versions) == [1, 2]
    assert client.get_model_version_download_uri("sarm-demo", "1") == f"runs:/{tracker.parent.run_id}/model"
    assert "model/MLmodel" in [file.path for file in client.list_artifacts(tracker.parent.run_id, "model")]


def test_steps_that_are_repeated_are_not_logged_again(run: RunSettings) -> None:
    parent = Tracker(run, "a").parent
    for steps in ((1, 2, 3, 4), (3, 4, 5)):
        progress = Progress("sarm", parent, ())
        for step in steps:
            progress(step, {"loss": 1 / step, "progress": step / 10})
        # What a process ends with.
        close_all()
    parent.flush()
    for metric in ("sarm/loss", "sarm/progress"):
        found = MlflowClient(parent.uri).get_metric_history(parent.run_id, metric)
        assert [entry.step for entry in found] == [1, 2, 3, 4, 5]


def test_workers_get_a_picklable_handle_with_an_absolute_uri(run: RunSettings) -> None:
    handle = pickle.loads(pickle.dumps(Tracker(run, "a").parent))
    handle.log_metrics({"loss": 1.0})
    assert handle.uri.startswith("sqlite:////")


@pytest.mark.parametrize(
    ("uri", "reason"), [("sqlite:///mlflow.db", "is relative"), ("mlruns", "neither a server nor a database")]
)
def test_places_that_would_differ_between_workers_are_refused(run: RunSettings, uri: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tracking_uri(RunSettings(out=run.out, mlflow_uri=uri))


def test_an_unreachable_server_is_one_clear_error(run: RunSettings) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        Tracker(RunSettings(out=run.out, mlflow_uri="http://127.0.0.1:9"), "a")


_STARTS = """
import sys, time
from pathlib import Path
from sarm.settings.run import RunSettings
from sarm.engine.mlflow.tracker import Tracker
folder, name = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{name}").touch()
while len(list(folder.glob("ready-*"))) < 3:
    time.sleep(0.001)
Tracker(RunSettings(out=folder / name), name)
"""


def test_jobs_that_start_together_make_one_database(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    jobs = [
        subprocess.Popen([sys.executable, "-c", _STARTS, str(tmp_path), name], env=environment, stderr=subprocess.PIPE)
        for name in ("a", "b", "c")
    ]
    for job in jobs:
        _, said = job.communicate(timeout=300)
        assert job.returncode == 0, said.decode()[-2000:]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == RunSettings(out=tmp_path).experiment]
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"a", "b", "c"}


def test_settings_that_changed_get_a_new_run_since_parameters_cannot(run: RunSettings, capsys) -> None:
    first = Tracker(run, "a", params={"k": "3"})
    first.parent.log_params({"k": "3"})
    same = Tracker(run, "a", first.parent.run_id, params={"k": "3", "layer": "1"})
    assert same.parent.run_id == first.parent.run_id
    other = Tracker(run, "a", first.parent.run_id, params={"k": "4"})
    assert other.parent.run_id != first.parent.run_id
    assert "k changed since its MLflow run" in capsys.readouterr().out


def test_runs_say_who_made_them_with_what_from_which_commit(run: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[2] / "jobs" / "pipeline.py"
    monkeypatch.setattr(sys, "argv", [str(script), "tiny", "--sae.k", "4"])
    monkeypatch.setenv("LOGNAME", "ada")
    tracker = Tracker(run, "a")
    with tracker.stage("train SAE", None, {}) as child:
        pass
    for run_id in (tracker.parent.run_id, child.run_id):
        tags = MlflowClient(tracker.uri).get_run(run_id).data.tags
        assert (tags["mlflow.user"], tags["mlflow.source.name"], tags["preset"]) == ("ada", "jobs/pipeline.py", "tiny")
        assert tags["command"] == "python jobs/pipeline.py tiny --sae.k 4"
        assert tags["mlflow.source.git.commit"] == git_commit()
    assert tags["stage"] == "train SAE"


def test_a_data_set_is_listed_once_with_its_source_and_digest(run: RunSettings) -> None:
    tracker = Tracker(run, "a")
    data = DataSet("demo:harm", "0123456789ab", "local", '{"uri": "demo:harm"}', '{"rows": 3}', "pairs")
    for _ in range(2):
        tracker.parent.log_data_set(data)
    (found,) = MlflowClient(tracker.uri).get_run(tracker.parent.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest, found.dataset.source) == (*data[:2], data.source)
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "pairs")]


def audit(run: RunSettings, **changes: Any) -> AuditFeatures:
    pairs = {"select": ("a",), "target": ("a",), "off_target": ("b",)}
    return AuditFeatures(run=run, sarm=run.out / "sarm", **pairs, **changes)


def parent_of(config: Any) -> str:
    with open_session(config) as session:
        return session.tracker.parent.run_id


def test_operational_settings_do_not_make_another_run(run: RunSettings) -> None:
    first = parent_of(audit(run))
    assert parent_of(audit(run, redo=True, batch_tokens=64)) == first
    assert "redo" not in MlflowClient(tracking_uri(run)).get_run(first).data.params
    assert parent_of(audit(run, max_features=3)) != first


def test_jobs_on_an_audit_s_folder_go_on_with_its_run_and_leave_its_settings(
    run: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(session: Session, settings: Any) -> None:
        parents.append(session.tracker.parent.run_id)

    monkeypatch.setattr(steering, "steer", touch)
    monkeypatch.setattr(relabelling, "relabel", touch)
    parents = [parent_of(audit(run))]
    before = MlflowClient(tracking_uri(run)).get_run(parents[0]).data.params
    for strength, name in ((2.0, "doubled"), (3.0, "safer"), (2.0, "doubled")):
        steer.main(Steer(run=run, name=name, strength=strength))
    relabel.main(Relabel(run=run))
    parents.append(parent_of(audit(run)))
    assert parents == [parents[0]] * 6
    assert MlflowClient(tracking_uri(run)).get_run(parents[0]).data.params == before


def test_what_a_killed_job_left_running_ends_when_another_run_takes_its_place(run: RunSettings) -> None:
    other = Tracker(RunSettings(out=run.out.with_name("b")), "b").parent
    client = MlflowClient(other.uri)

    def status(one: StageRun) -> str:
        return client.get_run(one.run_id).info.status

    killed = Tracker(run, "a", params={"k": "3"})
    killed.parent.log_params({"k": "3"})
    # As a process that is killed leaves it: entered, and not ended.
    stage = killed._run("train SAE", None, {"mlflow.parentRunId": killed.parent.run_id})
    replaced = Tracker(run, "a", killed.parent.run_id, params={"k": "4"}).parent
    assert (status(killed.parent), status(stage), status(replaced)) == ("KILLED", "KILLED", "RUNNING")
    # As after --redo-from, which moves the file with the id aside.
    anew = Tracker(run, "a", None, params={"k": "4"}).parent
    assert (status(replaced), status(anew), status(other)) == ("KILLED", "RUNNING", "RUNNING")
