"""Folders of outputs that are moved or copied: nothing is ever written into the place they came from."""

import json
import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from tests.stages.random_sarm import random_sarm

from sarm.engine.mlflow import mlflow_calls, moved_database, outbox
from sarm.engine.mlflow.moved_database import ARTIFACTS, PLACE_TAG, follow
from sarm.engine.mlflow.outbox import close_all
from sarm.engine.mlflow.tracker import Tracker
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings


@pytest.fixture
def old(tmp_path: Path, mlflow_db: Path, tiny_folder: Path, tiny_chat, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Outputs with one finished run, a stage, artifacts and a model that is registered by reference."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "old outputs"
    folder.mkdir()
    shutil.copy(mlflow_db, folder / "mlflow.db")
    random_sarm(folder / "a" / "sarm", tiny_folder, tiny_chat)
    tracker = Tracker(RunSettings(out=folder / "a"), "a")
    with tracker.stage("train SARM", None, {}) as child:
        child.log_text("old", "note.txt")
        child.register_model(folder / "a" / "sarm", "sarm-sarm", "reference")
    (folder / "a" / "id").write_text(tracker.parent.run_id)
    tracker.parent.end("FINISHED")
    close_all()
    return folder


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def addresses(database: Path) -> set[str]:
    """Every text of the database that holds an address of a file, wherever it stands."""
    with sqlite3.connect(database) as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [row for table in tables for row in store.execute(f'SELECT * FROM "{table}"')]
    return {
        value for row in rows for value in row if isinstance(value, str) and "old outputs" in value.replace("%20", " ")
    }


def test_a_copied_folder_is_logged_to_in_its_new_place_and_the_old_one_keeps_every_byte(old, tmp_path):
    new = tmp_path / "elsewhere" / "new"
    shutil.copytree(old, new)
    before = contents(old)
    tracker = Tracker(RunSettings(out=new / "a"), "a", (new / "a" / "id").read_text())
    tracker.parent.log_text("new", "note.txt")
    with tracker.stage("evaluate", None, {}) as child:
        child.log_text("new", "other.txt")
        child.log_metrics({"accuracy": 1.0})
    fresh = Tracker(RunSettings(out=new / "b"), "b")
    fresh.parent.log_text("fresh", "note.txt")
    close_all()
    assert contents(old) == before
    assert tracker.parent.run_id == (old / "a" / "id").read_text(), "the copy goes on with the same run"
    written = {path.read_text() for path in (new / ARTIFACTS).rglob("note.txt")}
    assert written == {"old", "new", "fresh"}
    assert addresses(new / "mlflow.db") == set()


def test_old_artifacts_and_a_model_by_reference_are_read_from_the_new_place(old, tmp_path):
    new = tmp_path / "new"
    old.rename(new)
    assert follow(new / "mlflow.db") == [old]
    uri = f"sqlite:///{new / 'mlflow.db'}"
    client = MlflowClient(uri)
    (version,) = client.search_model_versions("name = 'sarm-sarm'")
    mlflow.set_tracking_uri(uri)
    try:
        (found,) = mlflow.pyfunc.load_model("models:/sarm-sarm/1").predict(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
        )
        note = mlflow.artifacts.load_text(f"runs:/{version.run_id}/note.txt")
    finally:
        mlflow.set_tracking_uri(None)
    assert isinstance(found, float)
    assert note == "old"


def test_following_twice_changes_nothing(old, tmp_path):
    shutil.copytree(old, tmp_path / "new")
    assert follow(tmp_path / "new" / "mlflow.db") == [old]
    before = contents(tmp_path / "new")
    assert follow(tmp_path / "new" / "mlflow.db") == []
    assert contents(tmp_path / "new") == before


def test_a_database_in_its_own_place_is_left_alone_whatever_name_the_place_has(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    before = contents(old)
    assert follow(old / "mlflow.db") == []
    assert follow(tmp_path / "link" / "mlflow.db") == []
    assert follow(tmp_path / "nowhere" / "mlflow.db") == []
    assert contents(old) == before


def without_tag(database: Path) -> None:
    """As databases were before they knew their place."""
    with sqlite3.connect(database) as store:
        store.execute("DELETE FROM experiment_tags WHERE key = ?", (PLACE_TAG,))


def test_an_older_database_follows_if_the_artifacts_of_its_runs_lie_beside_it(old, tmp_path):
    without_tag(old / "mlflow.db")
    shutil.copytree(old, tmp_path / "new")
    assert follow(tmp_path / "new" / "mlflow.db") == [old]
    assert addresses(tmp_path / "new" / "mlflow.db") == set()


def test_an_older_database_whose_artifacts_are_elsewhere_on_purpose_is_left_alone(old, tmp_path):
    without_tag(old / "mlflow.db")
    (tmp_path / "databases" / ARTIFACTS / "another").mkdir(parents=True)
    shutil.copy(old / "mlflow.db", tmp_path / "databases")
    assert follow(tmp_path / "databases" / "mlflow.db") == []


def test_artifacts_go_beside_a_database_that_is_elsewhere(tmp_path, mlflow_db):
    (tmp_path / "databases").mkdir()
    shutil.copy(mlflow_db, tmp_path / "databases" / "all.db")
    run = RunSettings(out=tmp_path / "outputs" / "a", mlflow_uri=f"sqlite:///{tmp_path}/databases/all.db")
    Tracker(run, "a").parent.log_text("hello", "note.txt")
    assert list((tmp_path / "databases" / ARTIFACTS).rglob("note.txt"))


def test_what_waits_in_a_copied_outbox_is_sent_to_the_copy(old, tmp_path, monkeypatch):
    """The process that logged it was killed while MLflow was away; the files it had written wait beside the record."""
    monkeypatch.setattr(mlflow_calls, "WAITS", (0.01,))
    monkeypatch.setattr(outbox, "LAST_SECONDS", 0.1)
    run_id = (old / "a" / "id").read_text()
    waiting = old / ".mlflow-outbox"
    (waiting / "files-1").mkdir(parents=True)
    (waiting / "files-1" / "late.txt").write_text("late")
    uri = f"sqlite:///{old / 'mlflow.db'}"
    lines = [
        {"uri": uri, "run_id": run_id, "folder": str(waiting)},
        {"kind": "artifact", "path": str(waiting / "files-1" / "late.txt"), "folder": None, "is_copy": True},
        {"kind": "metrics", "step": 0, "time": 1, "series": None, "metrics": {"late": 1.0}},
    ]
    (waiting / f"{run_id}.host-1-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    new = tmp_path / "new"
    shutil.copytree(old, new)
    before = contents(old)
    Tracker(RunSettings(out=new / "a"), "a", run_id)
    close_all()
    assert contents(old) == before
    assert MlflowClient(f"sqlite:///{new / 'mlflow.db'}").get_run(run_id).data.metrics == {"late": 1.0}
    assert [path.read_text() for path in (new / ARTIFACTS).rglob("late.txt")] == ["late"]
    assert not list((new / ".mlflow-outbox").rglob("*"))


def test_a_moved_database_that_cannot_be_written_to_is_refused(old, tmp_path, monkeypatch):
    monkeypatch.setattr(moved_database, "_WAIT_SECONDS", 0.1)
    shutil.copytree(old, tmp_path / "new")
    with sqlite3.connect(tmp_path / "new" / "mlflow.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="cannot be told so: database is locked"):
            follow(tmp_path / "new" / "mlflow.db")
