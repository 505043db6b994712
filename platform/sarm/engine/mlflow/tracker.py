"""The parent run of an output folder in MLflow and a child for each of its stages, continued under the same ids after a restart.

A file of its own, because importing MLflow takes a second and refusals should not wait for it.
"""

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from sarm.engine import wandb
from sarm.engine.mlflow import run_card, run_list
from sarm.engine.mlflow.mlflow_calls import is_away, patiently
from sarm.engine.mlflow.moved_database import PLACE_TAG, artifacts_of, database_of, follow
from sarm.engine.mlflow.outbox import send_left
from sarm.engine.mlflow.tracking import StageRun, ended_by, outbox_of, tracking_uri
from sarm.engine.terminal import say
from sarm.settings.checks import UserError
from sarm.settings.extras import need
from sarm.settings.run import RunSettings

# Without these a dead server blocks every call for minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# Tag of a parent run: the folder that it belongs to.
OUT_TAG = "sarm.out"
_LIST_TAGS = {run_list.KIND_TAG: run_list.KIND, run_list.VIEW_TAG: run_list.view()}


class Tracker:
    """The parent run of an output folder and its children.

    Raises UserError if the tracking server cannot be reached or refuses.
    """

    def __init__(
        self,
        run: RunSettings,
        run_name: str,
        parent_run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ):
        self.uri, self._outbox = tracking_uri(run), outbox_of(run)
        self._events = (run.out / "tensorboard").absolute() if run.tensorboard else None
        if run.tensorboard:
            need("tensorboard")
        if run.wandb:
            wandb.check()
        run.out.parent.mkdir(parents=True, exist_ok=True)
        _prepare()
        try:
            with alone_with(self.uri):
                if database := database_of(self.uri):
                    for old in follow(database):
                        say(f"{database.parent} was {old}: its MLflow database now names this place")
                self._client = _client(self.uri)
                self.experiment_id = self._experiment(run)
            send_left(self._outbox)
            self.parent = self._run(
                run_name, parent_run_id, {**(tags or {}), OUT_TAG: self._name_of(run.out)}, params or {}
            )
            if self.parent.run_id != parent_run_id:
                self._end_left(self._name_of(run.out), parent_run_id)
            if run.wandb:
                self.parent = replace(self.parent, wandb=_mirror(run, run_name, self.parent.run_id, params or {}))
        except MlflowException as error:
            raise UserError(
                f"MLflow at {self.uri} cannot be used: {str(error).splitlines()[0]} Pass another --mlflow-uri."
            ) from error

    @contextmanager
    def stage(self, name: str, run_id: str | None, params: Mapping[str, Any]) -> Iterator[StageRun]:
        """A child run, continued if `run_id` still exists; closed as KILLED if the body was stopped, as FAILED if it raises."""
        tags = {MLFLOW_PARENT_RUN_ID: self.parent.run_id, "stage": name}
        child = patiently(self.uri, lambda: self._run(name, run_id, tags))
        if self._events is not None:
            child = replace(child, events=self._events / re.sub(r"\W+", "-", name.lower()).strip("-"))
        if (group := self.parent.wandb) is not None:
            child = replace(child, wandb=replace(group, run_id=child.run_id, name=name, settings=dict(params)))
        child.log_params(params)
        try:
            yield child
        except BaseException as error:
            child.end(ended_by(error))
            raise
        child.end("FINISHED")

    def _run(
        self, name: str, run_id: str | None, tags: dict[str, str], params: Mapping[str, str] | None = None
    ) -> StageRun:
        """The run of this id. A new run if there is none, or if it has other values of `params`, which MLflow cannot change."""
        if run_id is not None:
            try:
                found = self._client.get_run(run_id)
                known = found.data.params
                if changed := [key for key, value in (params or {}).items() if known.get(key, value) != value]:
                    say(f"{name}: {', '.join(changed)} changed since its MLflow run, so that it gets a new one")
                elif found.info.lifecycle_stage == "active":
                    self._client.update_run(run_id, status="RUNNING")
                    return StageRun(self.uri, run_id, self._outbox)
            except MlflowException as error:
                if is_away(error):
                    raise
                pass  # another database: the old id means nothing there, so a new run is made
        tags = {**run_card.origin(), **tags, MLFLOW_RUN_NAME: name}
        created = self._client.create_run(self.experiment_id, tags={key: text for key, text in tags.items() if text})
        return StageRun(self.uri, created.info.run_id, self._outbox)

    def _name_of(self, out: Path) -> str:
        """The name of a folder in the tag: relative to the database if it lies beside it, so that a moved database still knows it; else its path."""
        database = database_of(self.uri)
        inside = database is not None and out.is_relative_to(database.parent)
        return str(out.relative_to(database.parent) if database is not None and inside else out)

    def _end_left(self, out: str, replaced: str | None) -> None:
        """End what a killed job left RUNNING: the parents of the folder that this new one takes the place of, and their stages."""
        running = self._client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'")
        left = {
            run.info.run_id for run in running if run.info.run_id == replaced or run.data.tags.get(OUT_TAG) == out
        } - {self.parent.run_id}
        for run in running:
            if run.info.run_id in left or run.data.tags.get(MLFLOW_PARENT_RUN_ID) in left:
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _experiment(self, run: RunSettings) -> str:
        if (found := self._client.get_experiment_by_name(run.experiment)) is None:
            try:
                # A bare sqlite store would put artifacts into whatever folder the job was started from.
                location = artifacts_of(self.uri)
                place = {PLACE_TAG: str(Path(self.uri.removeprefix("sqlite:///")).parent)} if location else {}
                return self._client.create_experiment(run.experiment, location, {**_LIST_TAGS, **place})
            except MlflowException:
                # Another job may have made it in the meantime.
                if (found := self._client.get_experiment_by_name(run.experiment)) is None:
                    raise
        _tag_list(self._client, found)
        return found.experiment_id


def _mirror(run: RunSettings, name: str, run_id: str, params: Mapping[str, str]) -> wandb.WandbRun:
    """The parent run in Weights & Biases, and its group."""
    return wandb.WandbRun(
        run_id=run_id,
        name=name,
        # By its name alone runs of two folders could be one group.
        group=f"{name} {run_id[:8]}",
        project=run.experiment,
        settings=dict(params),
        # Beside the folder: where that is a stage's own, its manifest has every file in it.
        folder=run.out.parent.absolute(),
    )


def _tag_list(client: MlflowClient, experiment: Experiment) -> None:
    """Let the experiment open as a list of runs: a kind that somebody chose stays, the columns are those of this version."""
    for key, value in _LIST_TAGS.items():
        if key not in experiment.tags or (key == run_list.VIEW_TAG and experiment.tags[key] != value):
            client.set_experiment_tag(experiment.experiment_id, key, value)


def experiment_for_list(uri: str, name: str) -> str | None:
    """The id of an experiment, with the tags that its list opens by; None if there is none of the name.

    Raises UserError if MLflow cannot be asked.
    """
    _prepare()
    try:
        client = _client(uri)
        if (found := client.get_experiment_by_name(name)) is None:
            return None
        _tag_list(client, found)
    except MlflowException as error:
        raise UserError(
            f"MLflow at {uri} cannot be used: {str(error).splitlines()[0]} Pass another --mlflow-uri."
        ) from error
    return found.experiment_id


def _prepare() -> None:
    """Make MLflow's client give up soon and say little."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Its schema migrations announce themselves line by line on first use.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def alone_with(uri: str) -> Iterator[None]:
    """Keep other processes of this machine waiting while the body makes or migrates a sqlite database: MLflow's migrations break each other."""
    folder = Path(uri.removeprefix("sqlite:///")).parent
    if not uri.startswith("sqlite:") or not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # A file system without locks goes without this one.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)
