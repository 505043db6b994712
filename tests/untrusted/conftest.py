"""One small run for all tests of this folder, and jobs that must not get as far as to ask for a cluster."""

from pathlib import Path
from typing import NoReturn

import pytest
import ray
from tests.untrusted.small_run import write_run
from tests.untrusted.world import World

from sarm.data.tokens.chat import ChatTokenizer
from sarm.engine.mlflow.tracker import Tracker
from sarm.settings.run import RunSettings


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_chat: ChatTokenizer) -> Path:
    """A finished run of the tiny preset, untrained; tests copy what they spoil."""
    return write_run(tmp_path_factory.mktemp("small") / "run", tiny_folder, tiny_chat)


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that is made once: MLflow takes seconds for a new one."""
    run = RunSettings(out=tmp_path_factory.mktemp("tracking") / "none")
    return Tracker(run, "first").uri


@pytest.fixture
def world(
    tmp_path: Path, small_run: Path, tiny_folder: Path, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch
) -> World:
    def no_cluster(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a cluster was asked for")

    # Other tests of this process may have a cluster; a job must not get as far as to ask for one.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", no_cluster)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return World(tmp_path, small_run, tiny_folder, mlflow_uri)
