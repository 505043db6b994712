"""A random SARM that is served in this process, with a mean and a spread of rewards that are not 0 and 1."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient
from tests.stages.random_sarm import random_sarm, with_scale

from sarm.serve.app import make_app
from sarm.serve.loading import load_service
from sarm.serve.service import Service
from sarm.settings.serving import Serving

MEAN, STD = 0.75, 2.5


@pytest.fixture(scope="session")
def served(tiny_folder: Path, tiny_chat: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random SARM, and beside it the edit of one of its latents."""
    folder = random_sarm(tmp_path_factory.mktemp("served") / "sarm", tiny_folder, tiny_chat)
    with_scale(folder, MEAN, STD)
    from safetensors.torch import load_file

    weight_S = load_file(folder / "model.safetensors")["score.weight"][0]
    edit = [{"latent": n, "before": float(weight_S[n]), "after": 0.0} for n in range(0, 96, 2)]
    (folder.parent / "edit.json").write_text(json.dumps({"source": "x", "weights": edit}))
    return folder


@pytest.fixture(scope="session")
def service(served: Path) -> Iterator[Service]:
    loaded = load_service(Serving(model=served, threads=1, variants=(f"even_off={served.parent / 'edit.json'}",)))
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), raise_server_exceptions=False) as made:
        yield made
