"""A real Ray cluster, a finished corpus and pairs, and a real MLflow database for the tests of the edge."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sarm.config import Pipeline, Run
from sarm.presets import PRESETS
from sarm.runtime import stages
from sarm.runtime.session import open_session


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local cluster for all tests; `local`, since a bare init would join any cluster on the machine."""
    # Workers as nice as the clusters that jobs start: behind the other process of the suite they would wait for each other.
    ray.init(
        address="local", num_cpus=6, include_dashboard=False, object_store_memory=200_000_000, logging_level="error",
        _system_config={"worker_niceness": 0},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def preset() -> Pipeline:
    """The tiny preset."""
    return PRESETS["tiny"][1]


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, preset: Pipeline, mlflow_db: Path) -> Path:
    """An output folder with corpus, pairs and activations of the tiny preset."""
    import dataclasses

    run = Run(out=tmp_path_factory.mktemp("run") / "tiny", cpus_per_worker=1)
    shutil.copy(mlflow_db, run.out.parent / "mlflow.db")
    with open_session(dataclasses.replace(preset, run=run)) as session:
        stages.prepare(session, preset.data)
        stages.extract(session, preset.model, preset.extraction)
    return run.out
