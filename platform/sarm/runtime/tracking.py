"""MLflow: one parent run, a child per stage, continued under the same ids after a restart.

Workers get a `StageRun`, which holds an absolute URI and a run id and nothing that cannot be pickled.
"""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from sarm.checks import StoppedError
from sarm.config import Run, UserError

# Without these a dead server blocks every call for minutes.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_LENGTH = 1000, 100, 6000


@dataclass(frozen=True)
class StageRun:
    """One MLflow run, by absolute URI and id."""

    uri: str
    run_id: str

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """Log finite numbers; others are left out, since MLflow would store an infinity as a huge number."""
        now = int(time.time() * 1000)
        finite = [Metric(k, float(v), now, step) for k, v in metrics.items() if v is not None and math.isfinite(v)]
        for start in range(0, len(finite), _MAX_METRICS):
            _client(self.uri).log_batch(self.run_id, metrics=finite[start : start + _MAX_METRICS])

    def last_step(self, metric: str) -> int:
        """The highest step that has this metric, -1 if none has: MLflow appends what is logged twice."""
        return max((entry.step for entry in _client(self.uri).get_metric_history(self.run_id, metric)), default=-1)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters that the run does not have yet: MLflow's cannot change, and a restarted run logs the same again."""
        client = _client(self.uri)
        known = client.get_run(self.run_id).data.params
        new = [Param(k, str(v)[:_MAX_PARAM_LENGTH]) for k, v in params.items() if k not in known]
        for start in range(0, len(new), _MAX_PARAMS):
            client.log_batch(self.run_id, params=new[start : start + _MAX_PARAMS])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file (or a whole folder) to the run."""
        if path.is_dir():
            _client(self.uri).log_artifacts(self.run_id, str(path), folder)
        else:
            _client(self.uri).log_artifact(self.run_id, str(path), folder)

    def register_model(self, folder: Path, name: str, place: str = "model") -> None:
        """Copy a model's folder to a place in the run and make it the newest version of a registered model, once for each place."""
        client = _client(self.uri)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"runs:/{self.run_id}/{place}"
        known = client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        if source not in [version.source for version in known]:
            client.log_artifacts(self.run_id, str(folder), place)
            client.create_model_version(name, source, self.run_id)

    def log_table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Log rows as a table that MLflow's run comparison shows."""
        columns = {key: [row.get(key) for row in rows] for key in (rows[0] if rows else {})}
        _client(self.uri).log_table(self.run_id, columns, name)

    def log_figure(self, figure: Any, name: str) -> None:
        """Log a matplotlib figure as a picture."""
        _client(self.uri).log_figure(self.run_id, figure, name)

    def log_text(self, text: str, name: str) -> None:
        """Log a text file."""
        _client(self.uri).log_text(self.run_id, text, name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        for key, value in tags.items():
            _client(self.uri).set_tag(self.run_id, key, value)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        _client(self.uri).set_terminated(self.run_id, status)


class Tracker:
    """The parent run of an output folder and its children.

    Raises UserError if the tracking server cannot be reached or refuses.
    """

    def __init__(
        self, run: Run, run_name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None
    ):
        self.uri = tracking_uri(run)
        run.out.parent.mkdir(parents=True, exist_ok=True)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # Its schema migrations announce themselves line by line on first use.
        for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self._client = _client(self.uri)
            self.experiment_id = self._experiment(run)
            self.parent = self._run(run_name, parent_run_id, dict(tags or {}))
        except MlflowException as error:
            raise UserError(
                f"MLflow at {self.uri} cannot be used: {str(error).splitlines()[0]} Pass another --mlflow-uri."
            ) from error

    @contextmanager
    def stage(self, name: str, run_id: str | None, params: Mapping[str, Any]) -> Iterator[StageRun]:
        """A child run, continued if `run_id` still exists; closed as KILLED if the body was stopped, as FAILED if it raises."""
        child = self._run(name, run_id, {MLFLOW_PARENT_RUN_ID: self.parent.run_id})
        child.log_params(params)
        try:
            yield child
        except BaseException as error:
            child.end(ended_by(error))
            raise
        child.end("FINISHED")

    def _run(self, name: str, run_id: str | None, tags: dict[str, str]) -> StageRun:
        if run_id is not None:
            try:
                found = self._client.get_run(run_id)
                if found.info.lifecycle_stage == "active":
                    self._client.update_run(run_id, status="RUNNING")
                    return StageRun(self.uri, run_id)
            except MlflowException:
                pass  # another database: the old id means nothing there, so a new run is made
        created = self._client.create_run(self.experiment_id, tags={**tags, MLFLOW_RUN_NAME: name})
        return StageRun(self.uri, created.info.run_id)

    def _experiment(self, run: Run) -> str:
        if found := self._client.get_experiment_by_name(run.experiment):
            return found.experiment_id
        # A bare sqlite store would put artifacts into whatever folder the job was started from.
        location = (run.out.parent / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
        return self._client.create_experiment(run.experiment, artifact_location=location)


def tracking_uri(run: Run) -> str:
    """The absolute URI of the run's MLflow.

    Raises UserError for a relative sqlite path or a plain folder, which would be another place on every worker.
    """
    uri = run.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"sqlite:///{run.out.parent / 'mlflow.db'}"
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        raise UserError(
            f"--mlflow-uri {uri} is relative, so every worker would log to a database of its own. Pass sqlite:////absolute/path.db or a server."
        )
    if "://" not in uri:
        raise UserError(
            f"--mlflow-uri {uri} is neither a server nor a database. Pass http://HOST:PORT or sqlite:////absolute/path.db."
        )
    return uri


def flat_params(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config values under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat.update(flat_params(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def ended_by(error: BaseException | None) -> str:
    """MLflow's word for how a run came to its end."""
    return "FINISHED" if error is None else "KILLED" if isinstance(error, StoppedError) else "FAILED"


def _client(uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=uri)
