"""Records for MLflow over outages, kills and restarts: each arrives once. The outages are faults put in the way of a real store."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from sarm.engine.mlflow import mlflow_calls, outbox
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.mlflow.tracking import StageRun
from sarm.engine.ray.training_progress import Progress
from sarm.settings.run import RunSettings

SEND = outbox.send


@pytest.fixture
def parent(tmp_path, monkeypatch, mlflow_db) -> Iterator[StageRun]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    monkeypatch.setattr(outbox, "WAITS", (0.01,))
    monkeypatch.setattr(mlflow_calls, "WAITS", (0.01,))
    monkeypatch.setattr(outbox, "LAST_SECONDS", 0.05)
    yield Tracker(RunSettings(out=tmp_path / "a"), "a").parent
    outbox.close_all()


def away(*_) -> None:
    raise MlflowException("API request to http://h failed")


def steps_of(run: StageRun, metric: str) -> list[int]:
    return [entry.step for entry in MlflowClient(run.uri).get_metric_history(run.run_id, metric)]


def files(run: StageRun) -> list[Path]:
    return list(run.outbox.rglob("*.jsonl"))


def test_an_outage_holds_nothing_up_and_loses_nothing(parent, monkeypatch, capsys):
    progress = Progress("sae", parent, ())
    progress(1, {"loss": 1.0, "progress": 0.1})
    parent.flush()
    monkeypatch.setattr(outbox, "send", away)
    for step in range(2, 9):
        progress(step, {"loss": 1.0, "progress": step / 10})
    parent.set_tags({"note": "said while it was away"})
    parent.log_text("hello", "folder/note.txt")
    assert steps_of(parent, "sae/loss") == [1]
    monkeypatch.setattr(outbox, "send", SEND)
    progress(9, {"loss": 1.0, "progress": 0.9})
    outbox.outbox(parent.uri, parent.run_id, parent.outbox).flush(seconds_away=30)
    client = MlflowClient(parent.uri)
    assert steps_of(parent, "sae/loss") == list(range(1, 10))
    assert client.get_run(parent.run_id).data.tags["note"] == "said while it was away"
    assert [file.path for file in client.list_artifacts(parent.run_id, "folder")] == ["folder/note.txt"]
    said = capsys.readouterr().out
    assert said.count("does not answer") == 1
    assert said.count("answers again") == 1
    outbox.close_all()
    assert not parent.outbox.exists()


def test_what_could_not_be_sent_waits_for_the_next_job_on_these_outputs(parent, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(outbox, "send", away)
    parent.log_metrics({"loss": 1.0}, 1)
    parent.end("FINISHED")
    outbox.close_all()
    assert "the next job on these outputs sends it" in capsys.readouterr().out
    assert len(files(parent)) == 1
    assert files(parent)[0].stat().st_mode & 0o077 == 0, "an address may hold a password"
    monkeypatch.setattr(outbox, "send", SEND)
    Tracker(RunSettings(out=tmp_path / "b"), "b")
    assert steps_of(parent, "loss") == [1]
    assert MlflowClient(parent.uri).get_run(parent.run_id).info.status == "FINISHED"
    assert files(parent) == []


_KILLED = """
    import os, signal, sys
    from pathlib import Path
    from sarm.engine.mlflow import mlflow_calls, outbox
    from sarm.engine.mlflow.tracking import StageRun
    from sarm.engine.ray.training_progress import Progress
    from mlflow.exceptions import MlflowException

    def away(*_):
        raise MlflowException("API request to http://h failed")

    outbox.send = away
    progress = Progress("sae", StageRun(*sys.argv[1:3], Path(sys.argv[3])), ())
    for step in (1, 2, 3, 4):
        progress(step, {"loss": 1.0, "progress": 0.1})
    (file,) = Path(sys.argv[3]).glob("*.jsonl")
    with file.open("a") as half:
        half.write('{"kind": "metr')
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_in_an_outage_and_the_one_that_goes_on_leave_each_step_once(parent):
    command = [sys.executable, "-c", textwrap.dedent(_KILLED), parent.uri, parent.run_id, str(parent.outbox)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == -9
    assert steps_of(parent, "sae/loss") == []
    progress = Progress("sae", parent, ())
    for step in (3, 4, 5):
        progress(step, {"loss": 1.0, "progress": 0.1})
    parent.flush()
    assert steps_of(parent, "sae/loss") == [1, 2, 3, 4, 5]


def test_records_of_a_process_that_lives_are_its_own_affair(parent, monkeypatch):
    monkeypatch.setattr(outbox, "send", away)
    parent.log_metrics({"loss": 1.0}, 1)
    monkeypatch.setattr(outbox, "WAITS", (60.0,))
    before = files(parent)
    monkeypatch.setattr(outbox, "send", SEND)
    assert outbox.send_left(parent.outbox), "nothing of an ended process was left"
    assert files(parent) == before


def test_what_mlflow_refuses_is_raised_where_it_is_said_and_holds_up_nothing_else(parent):
    wrong = StageRun(parent.uri, "0" * 32, parent.outbox)
    with pytest.raises(MlflowException, match="not found"):
        wrong.set_tags({"a": "b"})
    parent.log_params({"k": 1})
    with pytest.raises(MlflowException):
        parent.log_table([{"a": 1}], "../outside.json")
    parent.log_metrics({"loss": 2.0}, 1)
    parent.flush()
    assert steps_of(parent, "loss") == [1]


def test_one_record_that_is_refused_takes_no_other_with_it_when_a_later_process_sends(parent, monkeypatch, tmp_path):
    monkeypatch.setattr(outbox, "send", away)
    parent.log_metrics({"loss": 1.0}, 1)
    parent.log_table([{"a": 1}], "../outside.json")
    parent.log_metrics({"loss": 2.0}, 2)
    outbox.close_all()
    monkeypatch.setattr(outbox, "send", SEND)
    Tracker(RunSettings(out=tmp_path / "b"), "b")
    assert steps_of(parent, "loss") == [1, 2]
    assert files(parent) == []


def test_an_error_that_nobody_foresaw_does_not_end_the_sending(parent, monkeypatch):
    def broken(*_) -> None:
        raise TypeError("not what was expected")

    monkeypatch.setattr(outbox, "send", broken)
    with pytest.raises(MlflowException, match="not what was expected") as raised:
        parent.set_tags({"a": "b"})
    assert isinstance(raised.value.__cause__, TypeError), "what it was decides the job's exit status"
    monkeypatch.setattr(outbox, "send", SEND)
    parent.log_metrics({"loss": 1.0}, 1)
    parent.flush()
    assert steps_of(parent, "loss") == [1]


def test_what_a_killed_process_left_goes_first_however_long_that_takes(parent, monkeypatch):
    tried = []

    def away_at_first(*_) -> bool:
        tried.append(1)
        return len(tried) > 2

    monkeypatch.setattr(outbox, "send_left", away_at_first)
    parent.log_metrics({"loss": 1.0}, 1)
    assert outbox.outbox(parent.uri, parent.run_id, parent.outbox).flush(seconds_away=30)
    assert len(tried) == 3, "nothing is sent before it"
    assert steps_of(parent, "loss") == [1]


def test_a_question_that_needs_an_answer_is_asked_again_for_a_while(parent, monkeypatch):
    asked = []

    def ask() -> str:
        asked.append(1)
        if len(asked) < 4:
            away()
        return "run"

    assert mlflow_calls.patiently("http://h", ask) == "run"
    assert len(asked) == 4
    monkeypatch.setattr(mlflow_calls, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(MlflowException):
        mlflow_calls.patiently("http://h", away)


def answer(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("no", response=response)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MlflowException("API request to http://h/api failed with exception Max retries exceeded"), True),
        (MlflowException("(sqlite3.OperationalError) database is locked"), True),
        (MlflowException("Invalid artifact path: '..'"), False),
        (MlflowException("no such run", error_code=RESOURCE_DOES_NOT_EXIST), False),
        (requests.ConnectionError("refused"), True),
        (answer(503), True),
        (answer(429), True),
        (answer(403), False),
        (OSError("no space left on device"), False),
    ],
)
def test_what_asking_again_helps_against(error, expected):
    assert mlflow_calls.is_away(error) is expected
