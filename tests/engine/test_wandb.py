"""`--wandb`: what MLflow gets as metrics is in a run of Weights & Biases too, and nothing that it does ends a training.

With the library (`pip install '.[wandb]'`) its own files are read back; without it a recording stand-in has its place.
"""

import importlib.util
import json
import pickle
import shutil
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sarm.contracts.manifest import StageFolder, verify_files
from sarm.engine import wandb as mirrors
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.mlflow.tracking import close_outboxes, untracked
from sarm.engine.session import tracked_folder
from sarm.settings.checks import UserError
from sarm.settings.extras import MissingExtraError
from sarm.settings.run import RunSettings

IS_THERE = importlib.util.find_spec("wandb") is not None
needs_library = pytest.mark.skipif(not IS_THERE, reason="wandb is not installed: pip install '.[wandb]'")


@pytest.fixture
def run(tmp_path: Path, mlflow_db: Path) -> RunSettings:
    shutil.copy(mlflow_db, tmp_path / "mlflow.db")
    return RunSettings(out=tmp_path / "run", wandb=True)


class Run:
    """A run of the stand-in; `breaks` is the call at which its service is gone."""

    def __init__(self, asked: dict[str, Any], breaks: str, before: int):
        self.asked, self.breaks, self.resumed = asked, breaks, before > 0
        self.summary: dict[str, float] = {"sae/step": before} if before else {}
        self.history: list[dict[str, float]] = []
        self.axes: dict[str, str] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, float]) -> None:
        if self.breaks == "log":
            raise BrokenPipeError("the service is gone")
        self.history.append(values)
        self.summary.update(values)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if self.breaks == "finish":
            raise TimeoutError("the server did not take the rest")


class Library(types.ModuleType):
    """The calls of the library that are made, recorded; its server has the first `before` steps of a training already."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[Run] = []
        self.mode, self.is_logged_in, self.breaks, self.before = "online", True, "", 0

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(mode=self.mode))

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt
        assert not verify
        if self.breaks == "login":
            raise ValueError("the key has\n39 letters")
        return self.is_logged_in

    def Settings(self, **values: Any) -> dict[str, Any]:  # noqa: N802
        return values

    def init(self, **asked: Any) -> Run:
        if self.breaks == "init":
            raise ConnectionError("no\nserver")
        self.runs.append(Run(asked, self.breaks, self.before))
        return self.runs[-1]


@needs_library
def test_a_job_whose_folder_is_a_stages_own_leaves_nothing_in_it(run: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    with tracked_folder(folder := StageFolder(run.out, "figures/v1", {}), run) as own_run:
        own_run.log_metrics({"accuracy": 0.5})
        (run.out / "figures.json").write_text("{}")
        manifest = folder.finish({})
    wandb.teardown()
    assert list(manifest.files) == ["figures.json"]
    verify_files(run.out, manifest)
    assert len(list(run.out.parent.glob("wandb/offline-run-*"))) == 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    stand_in = Library()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr("sarm.settings.extras.is_installed", lambda module: True)
    yield stand_in
    mirrors.close_all()


def records(path: Path) -> Iterator[Any]:
    """What stands in a file of the library: after a header blocks of 32 KiB, in them pieces of a checksum, a length, a kind, and bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(whole)
            whole = b""


def history(found: list[Any]) -> list[dict[str, float]]:
    rows = [{item.nested_key[0]: json.loads(item.value_json) for item in one.history.item} for one in found if one.HasField("history")]  # fmt: skip
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]


@needs_library
def test_the_librarys_own_files_have_the_metrics_the_settings_the_name_and_the_group(run: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    tracker = Tracker(run, "run", params={"seed": "0"})
    with tracker.stage("train SAE", None, {"k": 16, "lr": float("inf"), "texts": ["a"]}) as stage:
        worker = pickle.loads(pickle.dumps(stage))
        worker.log_metrics({"sae/loss": 0.5, "sae/broken": float("nan")}, 1, series="sae/progress")
        worker.log_metrics({"sae/loss": 0.25}, 2, series="sae/progress")
        # As a worker's process ends; the job's goes on with the same run.
        close_outboxes()
        stage.log_metrics({"fvu": 0.125})
    with pytest.raises(RuntimeError), tracker.stage("evaluate", None, {}):
        raise RuntimeError("broken")
    tracker.parent.end("FINISHED")
    wandb.teardown()
    files = sorted(run.out.parent.glob(f"wandb/offline-run-*-{stage.run_id}/*.wandb"), key=lambda path: path.stat().st_mtime_ns)  # fmt: skip
    parts = [list(records(path)) for path in files]
    assert [history(part) for part in parts] == [[{"sae/loss": 0.5, "sae/step": 1}, {"sae/loss": 0.25, "sae/step": 2}], [{"fvu": 0.125, "step": 0}]]  # fmt: skip
    axes = {one.metric.name: one.metric.step_metric for part in parts for one in part if one.HasField("metric")}
    assert {"sae/loss": "sae/step", "fvu": "step"}.items() <= axes.items()
    for part in parts:
        (told,) = [one.run for one in part if one.HasField("run")]
        assert (told.run_id, told.display_name, told.project) == (stage.run_id, "train SAE", "sarm")
        assert told.run_group == f"run {tracker.parent.run_id[:8]}"
        config = {one.key: json.loads(one.value_json) for one in told.config.update if one.key != "_wandb"}
        assert config == {"k": 16, "lr": "inf", "texts": "['a']"}
        assert told.host == ""
        assert [one.exit.exit_code for one in part if one.HasField("exit")] == [0]
        assert not any(one.HasField("environment") or one.HasField("output_raw") for one in part)
    assert not list(run.out.parent.glob("wandb/*/files/*")), "neither code, packages nor console"
    # The stage that failed logged nothing, and stands there as failed; the job's own run has no metrics.
    others = [path for path in run.out.parent.glob("wandb/offline-run-*/*.wandb") if stage.run_id not in path.name]
    (failed,) = [list(records(path)) for path in others]
    assert [one.exit.exit_code for one in failed if one.HasField("exit")] == [1]


@needs_library
def test_who_is_not_logged_in_is_told_before_anything_begins(run: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    wandb.teardown()
    with pytest.raises(UserError, match=r"nobody is logged in to Weights & Biases. Run `wandb login`"):
        Tracker(run, "run")
    assert not run.out.exists()
    wandb.teardown()


def test_a_training_that_goes_on_leaves_out_the_steps_that_the_server_has(run: RunSettings, library: Library) -> None:
    tracker = Tracker(run, "run")
    library.before = 2
    with tracker.stage("train SAE", None, {"k": 16}) as stage:
        for step in (2, 3):
            stage.log_metrics({"sae/loss": 1.0 / step}, step, series="sae/progress")
        stage.log_metrics({"fvu": 0.125})
        stage.log_metrics({"none": None})
    (mirror,) = library.runs
    assert mirror.history == [{"sae/loss": 1 / 3, "sae/step": 3}, {"fvu": 0.125, "step": 0}]
    assert mirror.axes == {"sae/loss": "sae/step", "fvu": "step"}
    assert mirror.exit_code == 0
    assert {"id": stage.run_id, "name": "train SAE", "project": "sarm", "config": {"k": 16}}.items() <= mirror.asked.items()  # fmt: skip


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_what_breaks_there_is_said_once_and_ends_nothing(run: RunSettings, library: Library, breaks: str, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    tracker = Tracker(run, "run")
    library.breaks = breaks
    with tracker.stage("train SAE", None, {}) as stage:
        for step in (1, 2):
            stage.log_metrics({"sae/loss": 1.0 / step}, step, series="sae/progress")
    assert capsys.readouterr().out.count("Weights & Biases does not take this run's metrics") == 1
    assert len(library.runs) == (breaks != "init")
    assert MlflowClient(tracking_uri=tracker.uri).get_run(stage.run_id).data.metrics == {"sae/loss": 0.5}


def test_offline_asks_for_no_account_and_a_key_that_cannot_be_one_is_one_line(run: RunSettings, library: Library) -> None:  # fmt: skip
    library.is_logged_in = False
    with pytest.raises(UserError, match="nobody is logged in"):
        Tracker(run, "run")
    library.breaks = "login"
    with pytest.raises(UserError, match=r"^--wandb: Weights & Biases cannot be used: the key has 39 letters$"):
        Tracker(run, "run")
    library.mode = "offline"
    Tracker(run, "run")


def test_without_the_flag_nothing_is_sent(run: RunSettings, library: Library) -> None:
    with Tracker(RunSettings(out=run.out), "run").stage("train SAE", None, {}) as stage:
        stage.log_metrics({"sae/loss": 0.5}, 1)
    assert library.runs == []


def test_a_missing_library_is_one_line(run: RunSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sarm.settings.extras.is_installed", lambda module: module != "wandb")
    with pytest.raises(MissingExtraError, match=r"logging to Weights & Biases needs the wandb extra.*'sarm\[wandb\]'"):
        Tracker(run, "run")
    monkeypatch.setattr("sarm.engine.mlflow.tracking.is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match=r"^--wandb: training.* needs the train extra"):
        untracked(run)
