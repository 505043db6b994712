"""Our dashboards' JSON, read by SAEDashboard's own classes: `make test-formats`."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from sarm.contracts.tables import ACTIVATION_EDGES
from sarm.report.saedashboard import dashboard

PEERS = Path(os.environ.get("SARM_PEERS_PYTHON", Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"))
READ = """
import json, sys
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
print(json.dumps(NeuronpediaDashboardBatch(**json.load(sys.stdin)).to_dict()))
"""

pytestmark = pytest.mark.skipif(not PEERS.exists(), reason=f"SAEDashboard is not at {PEERS}: make test-formats")


def shown(latent: int, weight: float) -> dict:
    bins = len(ACTIVATION_EDGES) - 1
    place = {"parts": ["It was ", "a lie.", ""], "activation": 1.5, "decile": 10}
    return {
        "latent": latent, "weight": weight, "max": 1.5, "density": 0.02, "sentence_density": 0.0,
        "histogram": {"chosen": [1] * bins, "rejected": [2] * bins}, "nearest": [{"latent": 7, "cosine": 0.25}],
        "contexts": {"sentence": [place], "chosen": [{**place, "decile": 0}]},
    }  # fmt: skip


def test_its_reader_finds_in_it_what_we_wrote():
    batch = dashboard([shown(3, 0.5), shown(4, -0.25)], {"model": "some/model", "layer": 4}, {"model": "f" * 32})
    done = subprocess.run([PEERS, "-c", READ], input=json.dumps(batch), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout)
    assert {name: value for name, value in read.items() if name != "features"} == {
        name: value for name, value in batch.items() if name != "features"
    }
    for theirs, ours in zip(read["features"], batch["features"], strict=True):
        activations = [{k: v for k, v in one.items() if k in ours["activations"][0]} for one in theirs["activations"]]
        assert {k: theirs[k] for k in ours if k != "activations"} == {
            k: v for k, v in ours.items() if k != "activations"
        }
        assert activations == ours["activations"]
    weights = [(f["pos_str"], f["pos_values"], f["neg_str"], f["neg_values"]) for f in read["features"]]
    assert weights == [(["reward"], [0.5], [], []), ([], [], ["reward"], [-0.25])]
