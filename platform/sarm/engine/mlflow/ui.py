"""MLflow on the runs of a folder of outputs: the server on this machine, opened at the list of runs with the figures as columns."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sarm.engine.mlflow.moved_database import ARTIFACTS, database_of, follow
from sarm.engine.mlflow.run_list import address
from sarm.engine.mlflow.ui_command import DATABASE
from sarm.engine.supervisor import die_with_parent
from sarm.engine.terminal import open_page, say
from sarm.settings.checks import StoppedError, UserError, check
from sarm.settings.results_root import READ, place_paths
from sarm.settings.run import RunSettings

_HOST = "127.0.0.1"
_START_SECONDS, _STOP_SECONDS = 120.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Ui:
    """Which runs to look at, and where the server listens."""

    outputs: Path = field(default=Path("outputs"), metadata=READ)
    """Folder of outputs, or of one run in it: where `mlflow.db` and `mlartifacts` lie. It may have been moved or copied."""
    mlflow_uri: str = ""
    """Absolute sqlite address of a database elsewhere (sqlite:////PATH), or the address of a server that runs already."""
    experiment: str = RunSettings().experiment
    """MLflow experiment to open."""
    port: int = 5000
    """Port of the server, which listens on this machine alone; 0: a free one."""
    browser: bool = True
    """Open a browser, where there is a display."""

    def __post_init__(self) -> None:
        place_paths(self)
        check(self, "port", 0 <= self.port < 65536, "between 0 and 65535")


def serve(settings: Ui) -> None:
    """Start the server, print and open the address of the list, and wait until it ends or is interrupted.

    Raises UserError for a folder without runs, a port that is taken, a server that does not start.
    """
    if settings.mlflow_uri.startswith(("http://", "https://")):
        _show(settings, settings.mlflow_uri, settings.mlflow_uri)
        return
    database = _database(settings)
    port = settings.port or _free_port()
    _refuse_taken(port)
    server = f"http://{_HOST}:{port}"
    _bring_up_to_date(f"sqlite:///{database}", database)
    with _stopped_by_sigterm():
        # MLflow passes the signal of its parent's death on to its workers.
        process = subprocess.Popen(
            server_command(database, port), env=_environment(), start_new_session=True, preexec_fn=die_with_parent
        )
        try:
            _wait(process, server)
            _show(settings, server, f"sqlite:///{database}")
            say("Ctrl-C ends the server")
            status = process.wait()
        except (KeyboardInterrupt, StoppedError):
            _stop(process)
            say("the server has ended; the runs stay where they are")
            return
        finally:
            _stop(process)
    raise UserError(f"MLflow's server ended with status {status}. Its last lines above say why.")


def _database(settings: Ui) -> Path:
    if settings.mlflow_uri:
        if (database := database_of(settings.mlflow_uri)) is None:
            raise UserError(
                f"--mlflow-uri {settings.mlflow_uri} is neither a server nor an absolute database. Pass http://HOST:PORT or sqlite:////absolute/path.db."
            )
        places = [database]
    else:
        places = [settings.outputs / DATABASE, settings.outputs.parent / DATABASE]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"there are no runs yet: no {places[0]}. Run a job first, or pass --outputs FOLDER.")


def _bring_up_to_date(uri: str, database: Path) -> None:
    """Let a moved database know where it is, and an older one get MLflow's tables of today."""
    from sarm.engine.mlflow.tracker import alone_with

    with alone_with(uri):
        for old in follow(database):
            say(f"{database.parent} was {old}: its MLflow database now names this place")


def server_command(database: Path, port: int) -> list[str]:
    """MLflow's server on a database, its artifacts beside it, for this machine alone."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"),
        *("--artifacts-destination", str(database.parent / ARTIFACTS), "--host", _HOST, "--port", str(port)),
        *("--workers", "1"),
    ]


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """While the body runs, SIGTERM raises StoppedError in it; Ctrl-C raises KeyboardInterrupt without that."""

    def stop(*_: object) -> None:
        raise StoppedError("stopped by SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers, which are a group of their own."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
            return


def _environment() -> dict[str, str]:
    # A user's own address would be another database than the one asked for.
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_BACKEND_STORE_URI")}
    # Its runners of background jobs, which nothing here uses, outlive a server whose parent is killed.
    return {**own, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind((_HOST, 0))
        return int(free.getsockname()[1])


def _refuse_taken(port: int) -> None:
    with contextlib.closing(socket.socket()) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((_HOST, port))
        except OSError as error:
            raise UserError(f"port {port} is taken: {error.strerror}. Pass --port, or 0 for a free one.") from error


def _wait(process: "subprocess.Popen[bytes]", server: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise UserError(f"MLflow's server ended with status {status}. Its last lines above say why.")
        try:
            with urllib.request.urlopen(f"{server}/health", timeout=1):
                return
        except OSError:
            time.sleep(0.2)
    raise UserError(f"MLflow's server did not answer within {_START_SECONDS:.0f} s. Pass another --port.")


def _show(settings: Ui, server: str, uri: str) -> None:
    """Print the address of the experiment's list, and open it where somebody can see it."""
    from sarm.engine.mlflow.tracker import experiment_for_list

    found = experiment_for_list(uri, settings.experiment)
    if found is None:
        raise UserError(f"{uri} has no experiment {settings.experiment}. Pass --experiment, or run a job first.")
    link = address(server, found)
    say(f"runs: {link}")
    if settings.browser:
        open_page(link)
