"""What all tests that kill something share."""

import pytest


@pytest.fixture
def private_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """These clusters are reached from this machine alone and live for minutes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
