"""`--tensorboard`: what MLflow gets as metrics is in TensorBoard's files too."""

import pickle
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboardX.proto.event_pb2 import Event

from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.tensorboard import close_all
from sarm.settings.extras import MissingExtraError
from sarm.settings.run import RunSettings


@pytest.fixture
def run(tmp_path: Path, mlflow_db: Path) -> RunSettings:
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    return RunSettings(out=tmp_path / "run", tensorboard=True)


def events(folder: Path) -> Iterator[Event]:
    """What stands in a folder's files, oldest file first; a record is its length, a checksum, the event, a checksum."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            yield Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    found = [(one.tag, event.step, one.simple_value) for event in events(folder) for one in event.summary.value]
    return [(tag, step, round(value, 4)) for tag, step, value in found]


def test_metrics_of_a_stage_are_in_files_of_its_own_and_in_mlflow(run: RunSettings) -> None:
    tracker = Tracker(run, "run")
    with tracker.stage("train SAE", None, {}) as stage:
        # Workers get it so.
        worker = pickle.loads(pickle.dumps(stage))
        worker.log_metrics({"sae/loss": 0.5, "sae/none": None, "sae/broken": float("inf")}, 1, series="sae/progress")
        worker.log_metrics({"sae/loss": 0.25}, 2, series="sae/progress")
        stage.log_metrics({"fvu": 0.125})
    assert sorted(scalars(run.out / "tensorboard" / "train-sae")) == [("fvu", 0, 0.125), ("sae/loss", 1, 0.5), ("sae/loss", 2, 0.25)]  # fmt: skip
    logged = MlflowClient(tracking_uri=tracker.uri).get_run(stage.run_id).data.metrics
    assert logged == {"sae/loss": 0.25, "fvu": 0.125}


def test_a_training_that_goes_on_says_from_which_step_on_the_older_file_counts_no_more(run: RunSettings) -> None:
    tracker = Tracker(run, "run")
    with tracker.stage("train SAE", None, {}) as stage:
        for step in (1, 2, 3):
            stage.log_metrics({"sae/loss": 1.0 / step}, step, series="sae/progress")
        close_all()
        for step in (3, 4):
            stage.log_metrics({"sae/loss": 1.0 / step}, step, series="sae/progress")
    starts = [event.step for event in events(run.out / "tensorboard" / "train-sae") if event.HasField("session_log")]
    # TensorBoard drops steps of older files that are not before a start.
    assert starts[-1] == 3


def test_without_the_flag_nothing_is_written(run: RunSettings) -> None:
    tracker = Tracker(RunSettings(out=run.out), "run")
    with tracker.stage("train SAE", None, {}) as stage:
        stage.log_metrics({"sae/loss": 0.5}, 1)
    assert not (run.out / "tensorboard").exists()


def test_a_missing_library_is_one_line(run: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarm.settings.extras.is_installed", lambda module: module != "tensorboardX")
    with pytest.raises(MissingExtraError, match=r"logging to TensorBoard needs the tensorboard extra.*'sarm\[tensorboard\]'"):  # fmt: skip
        Tracker(run, "run")
