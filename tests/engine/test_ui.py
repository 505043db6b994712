"""`jobs/ui.py` with MLflow's real server, and what a browser shows there."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from sarm.engine.mlflow import run_list
from sarm.engine.mlflow.outbox import close_all
from sarm.engine.mlflow.tracker import Tracker
from sarm.engine.mlflow.ui import Ui, serve
from sarm.engine.mlflow.ui_command import ui_command
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings

SCRIPT = Path(__file__).parents[2] / "jobs" / "ui.py"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, mlflow_db: Path) -> Path:
    """Outputs with two runs, copied to another place and not opened there yet."""
    old = tmp_path_factory.mktemp("first") / "outputs"
    old.mkdir()
    shutil.copy(mlflow_db, old / "mlflow.db")
    for name, accuracy in (("a", 0.875), ("b", 0.75)):
        run = Tracker(RunSettings(out=old / name, mlflow_uri=f"sqlite:///{old / 'mlflow.db'}"), name).parent
        run.log_params({"layer": 1, "d_sae": 256, "k": 8})
        run.log_metrics({"heldout_accuracy": accuracy})
        run.log_text("hello", "note.txt")
        run.end("FINISHED")
    close_all()
    return Path(shutil.copytree(old, tmp_path_factory.mktemp("second") / "outputs"))


@contextmanager
def served(*arguments: object) -> Iterator[tuple[subprocess.Popen, str]]:
    """The job and the address that it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [sys.executable, str(SCRIPT), "--port", "0", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        # Whoever runs the tests in the background ignores Ctrl-C, and so would the job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as job:  # fmt: skip
        try:
            assert job.stdout is not None
            lines = iter(job.stdout.readline, "")
            yield job, next(line.partition("runs: ")[2].strip() for line in lines if "runs: " in line)
        finally:
            job.send_signal(signal.SIGTERM)


def test_it_serves_a_copied_folder_at_its_new_place_and_ends_with_ctrl_c(outputs):
    with served("--outputs", outputs) as (job, link):
        server, _, place = link.partition("/#")
        found = re.fullmatch(r"/experiments/(\d+)/runs\?workflowType=machine_learning&viewStateShareKey=sarm", place)
        assert found
        client = MlflowClient(server)
        experiment = client.get_experiment(found[1])
        assert experiment.artifact_location == (outputs / "mlartifacts").as_uri()
        state = json.loads(experiment.tags[run_list.VIEW_TAG])
        assert {"metrics.`heldout_accuracy`", "params.`layer`", "params.`k`"} <= set(state["selectedColumns"])
        run = client.search_runs([found[1]], "attributes.run_name = 'a'")[0]
        with urllib.request.urlopen(f"{server}/get-artifact?path=note.txt&run_id={run.info.run_id}") as answer:
            assert answer.read() == b"hello"
        job.send_signal(signal.SIGINT)
        assert job.stdout is not None
        said = job.stdout.read()
        assert "the server has ended; the runs stay where they are" in said
        assert "goes on" not in said, "a server has nothing to go on with"
        assert job.wait(30) == 0
    assert not answers(server), "nothing of it goes on"


def answers(server: str) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", int(server.rpartition(":")[2]))) == 0


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_the_job_that_started_it_however_that_ends(outputs, number):
    with served("--outputs", outputs) as (job, link):
        server = link.partition("/#")[0]
        assert answers(server)
        processes = psutil.Process(job.pid).children(recursive=True)
        assert processes
        job.send_signal(number)
        job.wait(30)
        deadline = time.monotonic() + 60
        # One that nobody waits for stays as a zombie, which is an end as well.
        while (alive := [one for one in processes if is_alive(one)]) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not alive
    assert not answers(server)


def test_a_folder_of_one_run_will_do(outputs):
    (outputs / "a").mkdir(exist_ok=True)
    with served("--outputs", outputs / "a") as (_, link):
        assert link.endswith("viewStateShareKey=sarm")


def test_who_asks_for_what_is_not_there_is_told_what_to_do(outputs, tmp_path):
    with pytest.raises(UserError, match=r"no runs yet: no .*mlflow\.db.*--outputs"):
        serve(Ui(outputs=tmp_path))
    with pytest.raises(UserError, match="neither a server nor an absolute database"):
        serve(Ui(mlflow_uri="sqlite:///relative.db"))
    with pytest.raises(UserError, match="port must be between 0 and 65535"):
        Ui(port=70000)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is taken.*--port"):
            serve(Ui(outputs=outputs, port=port))


def test_the_end_of_a_job_names_what_opens_its_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ui_command(f"sqlite:///{tmp_path}/outputs/mlflow.db", "1") == "make ui"
    assert ui_command("sqlite:////a b/outputs/mlflow.db", "1") == "make ui OUTPUTS='/a b/outputs'"
    monkeypatch.setattr(sys, "argv", ["jobs/pipeline.py"])
    assert ui_command("sqlite:////a/other.db", "1") == "python jobs/ui.py --mlflow-uri sqlite:////a/other.db"
    assert ui_command("http://h:5000", "7") == (
        "http://h:5000/#/experiments/7/runs?workflowType=machine_learning&viewStateShareKey=sarm"
    )


def test_who_has_the_program_alone_is_told_its_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sarm.settings.started._command", ("pipeline", "jobs/pipeline.py"))
    assert ui_command(f"sqlite:///{tmp_path}/outputs/mlflow.db", "1") == "sarm ui"
    assert ui_command("sqlite:////a b/outputs/mlflow.db", "1") == "sarm ui --outputs '/a b/outputs'"
    assert ui_command("sqlite:////a/other.db", "1") == "sarm ui --mlflow-uri sqlite:////a/other.db"
    assert ui_command("http://h:5000") == "http://h:5000"


@pytest.mark.parametrize("folder", ["outputs", "a b", "it's here", "for$HOME"])
def test_what_is_printed_opens_that_folder_when_it_is_typed(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/pipeline.py"])
    printed = ui_command(f"sqlite:///{tmp_path}/{folder}/mlflow.db")
    if printed.startswith("make"):
        # What make would run, of which the shell makes words.
        printed = f"{printed} -n | tail -n 1"
        (line,) = shell(printed)
        words = shlex.split(line)
        assert words[1:4] == ["jobs/ui.py", "--outputs", f"{tmp_path}/{folder}"]
    else:
        assert shell(f"printf '%s\\n' {printed}")[1:] == [
            "jobs/ui.py",
            "--mlflow-uri",
            f"sqlite:///{tmp_path}/{folder}/mlflow.db",
        ]


def shell(line: str) -> list[str]:
    # Under `make test` an inner make would tell which directory it enters and leaves.
    typed = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        line, shell=True, cwd=SCRIPT.parents[1], env=typed, capture_output=True, text=True, check=True
    ).stdout.splitlines()
