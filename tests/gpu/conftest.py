"""Tests of GPUs: skipped, each with its reason, where there are none."""

import pytest
import torch
from tests.gpu.cards import device, why_skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        needed = 2 if item.get_closest_marker("gpu2") else 1 if item.get_closest_marker("gpu") else 0
        if needed and (reason := why_skipped(needed)):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def card() -> torch.device:
    """The GPU."""
    return device()
