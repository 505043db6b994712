"""A cluster that asks for a token, as those of cluster/ do, started in a clean clone."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ray_head import Head, running_head

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone of this repository."""
    folder = tmp_path_factory.mktemp("clone") / "sarm"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory, clone: Path) -> Iterator[Head]:
    """A one-node cluster for all tests of submitted jobs; whoever uses it has an empty home folder."""
    outside = ("RAY_ADDRESS", "SARM_RESULTS", "MLFLOW_TRACKING_URI")
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path_factory.mktemp("home")),
    }
    with running_head(tmp_path_factory.mktemp("ray"), environment, started_in=clone) as running:
        yield running
