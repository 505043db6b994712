"""Calls of MLflow's client: sending the records of an outbox, telling an outage from a refusal, and asking until there is an answer.

A record is a dictionary that can be written as JSON. It has a `kind` and the fields of that kind.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from requests.exceptions import RequestException

from sarm.engine.terminal import say

Record = Mapping[str, Any]
Answer = TypeVar("Answer")
MAX_METRICS, _MAX_PARAMS = 1000, 100
# Seconds until MLflow is asked again, the last for good.
WAITS = (1.0, 2.0, 5.0, 10.0, 30.0)
# A new run needs an id from the server.
PATIENCE_SECONDS = 600.0
_AWAY = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
# The client gives every other error one code, INTERNAL_ERROR: a wrong path as well as a missing server.
_AWAY_MESSAGES = ("API request to", "OperationalError", "database is locked")


def send(uri: str, run_id: str, records: Sequence[Record], last_steps: dict[str, int]) -> None:
    """Do what the records say; raises what MLflow raises.

    Records with a `series` (the name of a metric that each of its steps has) are left out up to the last step that the run has of it:
    a training that goes on from a state repeats the steps after it.
    """
    client = MlflowClient(tracking_uri=uri)
    kind = records[0]["kind"]
    if kind == "metrics":
        metrics = []
        for record in records:
            series, step = record.get("series"), record["step"]
            if series is not None:
                if series not in last_steps:
                    history = client.get_metric_history(run_id, series)
                    last_steps[series] = max((entry.step for entry in history), default=-1)
                if step <= last_steps[series]:
                    continue
            metrics += [Metric(key, value, record["time"], step) for key, value in record["metrics"].items()]
        for start in range(0, len(metrics), MAX_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])
        for record in records:
            if (series := record.get("series")) is not None:
                last_steps[series] = max(last_steps[series], record["step"])
        return
    (record,) = records
    if kind == "params":
        known = client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in record["params"].items() if key not in known]
        for start in range(0, len(new), _MAX_PARAMS):
            client.log_batch(run_id, params=new[start : start + _MAX_PARAMS])
    elif kind == "tags":
        for key, value in record["tags"].items():
            client.set_tag(run_id, key, value)
    elif kind == "artifact":
        _send_file(client, run_id, Path(record["path"]), record["folder"])
        if record["is_copy"]:
            shutil.rmtree(Path(record["path"]).parent, ignore_errors=True)
    elif kind == "table":
        client.log_table(run_id, record["columns"], record["name"])
    elif kind == "model":
        _register(
            client=client,
            run_id=run_id,
            folder=Path(record["path"]),
            name=record["name"],
            place=record["place"],
            copied=record.get("copied", True),
        )
    elif kind == "dataset":
        kinds = {key: record[key] for key in ("name", "digest", "source_type", "source", "profile")}
        context = InputTag("mlflow.data.context", record["context"])
        client.log_inputs(run_id, datasets=[DatasetInput(Dataset(**kinds), [context])])
    elif kind == "end":
        client.set_terminated(run_id, record["status"])
    else:
        raise ValueError(f"unknown record {kind!r}")


def _send_file(client: MlflowClient, run_id: str, path: Path, folder: str | None) -> None:
    if path.is_dir():
        client.log_artifacts(run_id, str(path), folder)
    elif path.exists():
        client.log_artifact(run_id, str(path), folder)
    else:
        say(f"{path} was deleted before MLflow could take it")


def _register(client: MlflowClient, run_id: str, folder: Path, name: str, place: str, *, copied: bool) -> None:
    # These imports take seconds, and runs without models do not need them.
    from sarm.engine.mlflow.registered_model import WEIGHTS, describe

    if not folder.is_dir():
        say(f"{folder} was deleted before MLflow could take it")
        return
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"runs:/{run_id}/{place}"
    known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    if source not in [version.source for version in known]:
        if copied:
            client.log_artifacts(run_id, str(folder), f"{place}/{WEIGHTS}")
        with tempfile.TemporaryDirectory() as described:
            describe(folder, Path(described), run_id, place, copied=copied)
            client.log_artifacts(run_id, described, place)
        client.create_model_version(name, source, run_id)


def is_away(error: Exception) -> bool:
    """Whether MLflow could not be asked, so that asking again helps; False if it refused."""
    if isinstance(error, MlflowException):
        return error.error_code in _AWAY or any(words in str(error) for words in _AWAY_MESSAGES)
    answer = getattr(error, "response", None)
    return isinstance(error, RequestException) and (
        answer is None or answer.status_code == 429 or answer.status_code >= 500
    )


def patiently(uri: str, ask: Callable[[], Answer]) -> Answer:
    """MLflow's answer to a question that needs one now; while MLflow is away, it is asked again for `PATIENCE_SECONDS`."""
    deadline, num_failures = time.monotonic() + PATIENCE_SECONDS, 0
    while True:
        try:
            return ask()
        except (MlflowException, RequestException) as error:
            if not is_away(error) or time.monotonic() > deadline:
                raise
            if not num_failures:
                say(
                    f"MLflow at {uri} does not answer ({str(error)[:80]}): waiting for it, {PATIENCE_SECONDS:.0f} s at most"
                )
            time.sleep(WAITS[min(num_failures, len(WAITS) - 1)])
            num_failures += 1
