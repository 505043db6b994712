"""`jobs/serve.py`: a reward server whose watch, where it is asked to, logs to MLflow."""

import json
import queue
import threading
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sarm.contracts.manifest import finite_or_null, write_atomically
from sarm.contracts.untrusted import read_json
from sarm.engine.terminal import open_page, say
from sarm.serve.server import listening
from sarm.serve.server import serve as serve_until_ended
from sarm.settings.card import CardPage
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings
from sarm.settings.serving import Serving
from sarm.settings.started import called

if TYPE_CHECKING:
    from sarm.engine.mlflow.tracker import Tracker
    from sarm.serve.service import Service
    from sarm.serve.shared_watch import Remote, WatchHost
    from sarm.serve.watch import Key, Watched

_TOP = 20
# The table and the page are written so often, and at every alarm.
_EVERY_STEPS = 50
_MAX_WAITING = 1000
_RUNS = "mlflow.json"


def serve(settings: Serving) -> None:
    """Serve until the process is asked to end. Raises UserError as `sarm.serve.server.serve`, and for an MLflow address that is none."""
    if settings.replicas:
        _serve_replicas(settings)
    elif settings.mlflow_uri:
        from sarm.engine.mlflow.tracking import tracking_uri

        tracking_uri(_run(settings))
        serve_until_ended(settings, lambda service: log_drift(service.account, settings))
    else:
        serve_until_ended(settings)


def try_card(settings: CardPage) -> None:
    """Serve a model on this machine alone, for the page on which it is tried. Raises UserError as `serve`."""
    serving = Serving(
        model=settings.model,
        edit=settings.edit,
        port=settings.port,
        contexts=settings.contexts,
        explanations=settings.explanations,
    )
    serve_until_ended(serving, open_page=open_page if settings.browser else None)


@dataclass(frozen=True)
class Build:
    """Makes the app in each replica: the same as a server without replicas has."""

    settings: Serving

    def __call__(self, watch: "Remote") -> "Replica":
        from sarm.serve.app import make_app
        from sarm.serve.loading import leave_cores_to_the_engine, load_service

        leave_cores_to_the_engine()
        service = load_service(self.settings, watch)
        return Replica(service, make_app(service, self.settings.read_token()))


@dataclass(frozen=True)
class BuildWatch:
    """Makes the watch of all replicas."""

    settings: Serving

    def __call__(self) -> "WatchHost":
        from sarm.serve.loading import load_watch

        host = load_watch(self.settings)
        if self.settings.mlflow_uri:
            log_drift(host.account, self.settings)
        return host


@dataclass(frozen=True)
class Replica:
    """One replica's service and app."""

    service: "Service"
    app: Any

    def fault(self) -> str:
        """Why its engine does not read; empty if it does."""
        return self.service.engine.fault

    def close(self) -> None:
        """End its threads."""
        self.service.close()


def application(args: dict[str, Any]) -> Any:
    """For Ray Serve's own tools, by the import path `sarm.stages.serving:application`: `args` are the flags of `jobs/serve.py`, as a mapping.

    Raises UserError for settings that make no sense.
    """
    from sarm.engine.ray import replicas

    known = {one.name: one for one in fields(Serving)}
    if wrong := [name for name in args if name not in known]:
        raise UserError(f"{wrong[0]} is no flag of {called('serve')}. Look at `args` of the application.")
    given: dict[str, Any] = {name: Path(value) if "Path" in str(known[name].type) else tuple(value) if isinstance(value, list) else value for name, value in args.items()}  # fmt: skip
    settings = Serving(**given)
    if not settings.token:
        raise UserError("the application is reached from other machines, and there is no token. Name `token: env:NAME` or `file:PATH` among its args.")  # fmt: skip
    return replicas.application(
        Build(settings),
        BuildWatch(settings),
        replicas=max(settings.replicas, 1),
        max_replicas=settings.max_replicas,
        cpus=settings.threads or 1,
        gpus=0.0,
    )


def _serve_replicas(settings: Serving) -> None:
    from sarm.engine.ray import replicas
    from sarm.passes.models import sarm_settings, sarm_spec, with_edit
    from sarm.serve.try_page import TRY

    settings.read_token()
    if settings.mlflow_uri:
        from sarm.engine.mlflow.tracking import tracking_uri

        tracking_uri(_run(settings))
    if not settings.model.is_dir():
        raise UserError(f"no model folder {settings.model}. Pass --model with a folder that holds a SARM.")
    sarm_settings(settings.model)
    with_edit(sarm_spec(settings.model), settings.edit)
    with listening(settings) as taken:
        port: int = taken.getsockname()[1]
    replicas.serve_replicas(
        Build(replace(settings, port=port)),
        BuildWatch(settings),
        host=settings.host,
        port=port,
        replicas=settings.replicas,
        max_replicas=settings.max_replicas,
        threads=settings.threads,
        ray_address=settings.ray_address,
        ready=lambda address: print(f"serving {settings.model} in {settings.replicas} replicas on {address}\na page to try it: {address}{TRY}", flush=True),
    )  # fmt: skip
    print("the server has ended", flush=True)


class Logged(NamedTuple):
    """What MLflow is told after a step."""

    name: str
    step: int
    metrics: dict[str, float]
    files: dict[str, str]


def log_drift(account: Any, settings: Serving) -> "MlflowDrift":
    """Let the watch of an account that is in this process log to MLflow."""
    log = MlflowDrift(settings)
    known: dict[Any, int] = {}

    def publish(key: "Key", watched: "Watched") -> None:
        from sarm.report.drift_page import drift_page

        with account.watch.reading():
            found = account.content(key, watched, _TOP)
        last = found["history"][-1]
        metrics = {name: value for name, value in last.items() if name != "step"}
        metrics |= {f"contribution/{one['latent']}": one["now"] for one in found["paid"]}
        metrics["alarms"] = float(len(found["alarms"]))
        files: dict[str, str] = {}
        if len(found["alarms"]) != known.get(key, 0) or found["steps"] % _EVERY_STEPS == 0:
            known[key] = len(found["alarms"])
            files = {"drift.json": json.dumps(finite_or_null(found), indent=1), "drift.html": drift_page([found], account.model)}  # fmt: skip
        name = key.run if (key.split, key.variant) == ("train", "base") else f"{key.run}, {key.split}, {key.variant}"
        log.put(Logged(name, int(last["step"]), metrics, files))

    account.watch.publish = publish
    return log


class MlflowDrift:
    """Sends to MLflow in a thread of its own: while it is away, nothing waits but this thread, and what was logged is in a file."""

    def __init__(self, settings: Serving):
        self._settings = settings
        self._trackers: dict[str, Tracker] = {}
        self._waiting: queue.Queue[Logged] = queue.Queue(_MAX_WAITING)
        self.num_lost = 0
        threading.Thread(target=self._send, name="drift to mlflow", daemon=True).start()

    def put(self, logged: Logged) -> None:
        """Take a step's figures; never waits. What there is no room for is counted and lost to MLflow: the watch's folder has it."""
        try:
            self._waiting.put_nowait(logged)
        except queue.Full:
            self.num_lost += 1

    def settled(self) -> None:
        """Wait until everything that came before was handed over."""
        self._waiting.join()

    def _send(self) -> None:
        is_away = False
        while True:
            logged = self._waiting.get()
            try:
                run = self._tracker(logged.name).parent
                run.log_metrics(logged.metrics, logged.step)
                for name, text in logged.files.items():
                    run.log_text(text, name)
                is_away = False
            # Whatever MLflow or its client fails with: the next step tries again.
            except Exception as error:
                if not is_away:
                    reason = str(error) if isinstance(error, UserError) else type(error).__name__
                    say(f"the watch cannot log to MLflow: {reason}")
                is_away = True
                self.num_lost += 1
            finally:
                self._waiting.task_done()

    def _tracker(self, name: str) -> "Tracker":
        if name not in self._trackers:
            from sarm.engine.mlflow.tracker import Tracker

            # A folder of its own: a tracker ends what is left running of its folder.
            run = _run(self._settings, name)
            path = run.out.parent / _RUNS
            ids: dict[str, str] = read_json(path) if path.exists() else {}
            tracker = Tracker(run, name, ids.get(name))
            self._trackers[name] = tracker
            write_atomically(path, json.dumps({**ids, name: tracker.parent.run_id}))
        return self._trackers[name]


def _run(settings: Serving, name: str = "") -> RunSettings:
    folder: Path | None = settings.drift_folder
    assert folder is not None
    return RunSettings(out=folder / "mlflow" / name, mlflow_uri=settings.mlflow_uri, experiment=settings.experiment)
