"""What stages and their workers log to an MLflow run, and where MLflow is.

Workers get a `StageRun`, which holds an absolute URI and a run id and nothing that cannot be pickled. Runs are made by `tracker`.
MLflow takes a second to import, so it is imported when something is logged.
"""

import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sarm.contracts.untrusted import holds_a_secret
from sarm.engine.mlflow.run_card import DataSet, parameters
from sarm.engine.terminal import say
from sarm.settings.checks import StoppedError, UserError
from sarm.settings.extras import MissingExtraError, is_installed, said_of
from sarm.settings.run import ModelsLogged, RunSettings
from sarm.settings.started import started

PARENT_RUN = "mlflow.parentRunId"
"""Tag of a run that hangs under another (MLflow's `MLFLOW_PARENT_RUN_ID`, which takes seconds to import)."""

if TYPE_CHECKING:
    from sarm.engine.mlflow.outbox import Outbox
    from sarm.engine.wandb import WandbRun

_MAX_PARAM_LENGTH = 6000
_OUTBOX = ".mlflow-outbox"


@dataclass(frozen=True)
class StageRun:
    """One MLflow run, by absolute URI and id; what is logged goes through the outbox in `outbox`, which all processes see."""

    uri: str
    run_id: str
    outbox: Path
    events: Path | None = None
    """Folder of TensorBoard's files of this run; None: it is not asked for."""
    wandb: "WandbRun | None" = None
    """What mirrors this run in Weights & Biases; None: it is not asked for."""

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0, series: str | None = None) -> None:
        """Log finite numbers; others are left out, since MLflow would store an infinity as a huge number.

        Never waits. With `series`, one of the metrics, steps that the run has already are left out.
        """
        finite = {key: float(value) for key, value in metrics.items() if value is not None and math.isfinite(value)}
        now = int(time.time() * 1000)
        self._box.put({"kind": "metrics", "step": step, "time": now, "series": series, "metrics": finite})
        if self.events is not None:
            from sarm.engine.tensorboard import log

            log(self.events, finite, step, goes_on=series is not None)
        if self.wandb is not None:
            from sarm.engine import wandb

            wandb.log(self.wandb, finite, step, series)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters that the run does not have yet: MLflow's cannot change, and a restarted run logs the same again."""
        self._log("params", params={key: str(value)[:_MAX_PARAM_LENGTH] for key, value in params.items()})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file (or a whole folder) to the run."""
        self._log("artifact", path=str(path.absolute()), folder=folder, is_copy=False)

    def register_model(self, folder: Path, name: str, how: ModelsLogged, place: str = "model") -> None:
        """Make a reward model's folder the newest version of a registered model, once for each place in the run.

        `how` says whether its weights are copied to MLflow or found by the folder's path; "none" does nothing.
        """
        if how != "none":
            self._log("model", path=str(folder.absolute()), name=name, place=place, copied=how == "copy")

    def log_data_set(self, data: DataSet) -> None:
        """Name a data set that the run reads or makes; the same again changes nothing."""
        self._log("dataset", **data._asdict())

    def log_config(
        self, config: Mapping[str, Any], script: str = "", settings: Mapping[str, str] | None = None
    ) -> None:
        """Log the few settings that tell a job's run from others (`parameters` if not given), and its whole config as `config/SCRIPT.json`."""
        self.log_params(parameters(config) if settings is None else settings)
        name = Path(script).stem if script.endswith(".py") else started().name
        self.log_text(json.dumps(config, indent=2), f"config/{name}.json")

    def log_table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Log rows as a table that MLflow's run comparison shows."""
        self._log(
            "table", columns={key: [row.get(key) for row in rows] for key in (rows[0] if rows else {})}, name=name
        )

    def log_figure(self, figure: Any, name: str) -> None:
        """Log a matplotlib figure as a picture."""
        self._log_new_file(name, figure.savefig)

    def log_text(self, text: str, name: str) -> None:
        """Log a text file."""
        self._log_new_file(name, lambda path: path.write_text(text))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set or replace tags."""
        self._log("tags", tags=dict(tags))

    def flush(self) -> None:
        """Wait until MLflow has what this and ended processes logged, unless it is away."""
        from sarm.engine.mlflow.outbox import flush_run

        flush_run(self.uri, self.run_id, self.outbox)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED, once MLflow has what this and ended processes logged."""
        self._box.put({"kind": "end", "status": status})
        self.flush()
        if (events := sys.modules.get("sarm.engine.tensorboard")) is not None:
            events.close_all()
        if self.wandb is not None:
            from sarm.engine import wandb

            wandb.end(self.wandb, failed=status != "FINISHED")

    def _log(self, kind: str, **content: Any) -> None:
        """Log something that a reader may look for at once: waits for MLflow, unless it is away."""
        self._box.put({"kind": kind, **content})
        self._box.flush()

    def _log_new_file(self, name: str, write: Callable[[Path], Any]) -> None:
        place, _, file_name = name.rpartition("/")
        folder = self.outbox / f"files-{uuid.uuid4().hex[:12]}"
        folder.mkdir(parents=True)
        write(folder / file_name)
        self._log("artifact", path=str(folder / file_name), folder=place or None, is_copy=True)

    @property
    def _box(self) -> "Outbox":
        from sarm.engine.mlflow.outbox import outbox

        return outbox(self.uri, self.run_id, self.outbox)


@dataclass(frozen=True)
class NotTracked(StageRun):
    """A run that MLflow does not hear of, because it is not installed: what it would be told is in the folder of the run."""

    uri: str = ""
    run_id: str = ""
    outbox: Path = Path()

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0, series: str | None = None) -> None:
        """Nothing, as all that follows."""

    def flush(self) -> None: ...

    def end(self, status: str) -> None: ...

    def _log(self, kind: str, **content: Any) -> None: ...

    def _log_new_file(self, name: str, write: Callable[[Path], Any]) -> None: ...


def untracked(run: RunSettings) -> NotTracked | None:
    """What takes the place of a run where MLflow is not installed, once that is said; None where it is.

    Raises MissingExtraError if the job names an MLflow of its own, or asks for what is kept beside MLflow.
    """
    if is_installed("mlflow"):
        return None
    flags = {f"--mlflow-uri {run.mlflow_uri}": run.mlflow_uri, "--tensorboard": run.tensorboard, "--wandb": run.wandb}
    if asked := [flag for flag, is_asked in flags.items() if is_asked]:
        raise MissingExtraError(f"{asked[0]}: {said_of('train', 'mlflow')}")
    say("MLflow is not installed (pip install 'sarm[train]'): this run is kept in its folder alone")
    return NotTracked()


def close_outboxes() -> None:
    """Wait for MLflow to have what this process logged, if it logged anything; says where the rest lies if MLflow is away."""
    if (events := sys.modules.get("sarm.engine.tensorboard")) is not None:
        events.close_all()
    if (mirrors := sys.modules.get("sarm.engine.wandb")) is not None:
        mirrors.close_all()
    if (outbox := sys.modules.get("sarm.engine.mlflow.outbox")) is not None:
        outbox.close_all()


def outbox_of(run: RunSettings) -> Path:
    """Where the records of a run's folder wait for MLflow: beside its database, seen by all processes."""
    return (run.out.parent / _OUTBOX).absolute()


def tracking_uri(run: RunSettings) -> str:
    """The absolute URI of the run's MLflow.

    Raises UserError for a relative sqlite path or a plain folder, which would be another place on every worker.
    """
    uri = run.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return f"sqlite:///{run.out.parent / 'mlflow.db'}"
    if holds_a_secret(uri):
        # It would be written into every run's parameters.
        raise UserError(
            "the address of MLflow holds a password. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and pass the address without."
        )
    if uri.startswith("sqlite:") and not uri.startswith("sqlite:////"):
        raise UserError(
            f"--mlflow-uri {uri} is relative, so every worker would log to a database of its own. Pass sqlite:////absolute/path.db or a server."
        )
    if "://" not in uri:
        raise UserError(
            f"--mlflow-uri {uri} is neither a server nor a database. Pass http://HOST:PORT or sqlite:////absolute/path.db."
        )
    return uri


def ended_by(error: BaseException | None) -> str:
    """MLflow's word for how a run came to its end."""
    return (
        "FINISHED" if error is None else "KILLED" if isinstance(error, StoppedError | KeyboardInterrupt) else "FAILED"
    )
