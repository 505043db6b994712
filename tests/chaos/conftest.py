"""What all tests that kill something share."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def private_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """These clusters are reached from this machine alone and live for minutes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, run_job: Callable[..., subprocess.CompletedProcess[str]]
) -> Path:
    """The outputs of a reward model's training, and of all before it, that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "tiny"
    done = run_job("train_sarm", "tiny", "--out", out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out
