"""The whole chain on the card, stopped and gone on with; rewards in bfloat16 beside float32."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tests.gpu.cards import ON_CORES

from sarm.data.store.pairs import load_pairs
from sarm.data.tokens.groups import prompt_groups
from sarm.passes.reader import sarm_reader

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
USE_GPU = "no" if ON_CORES else "yes"


def command(job: str, preset: str, out: Path, *flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / f"{job}.py"), preset, "--out", str(out), "--use-gpu", USE_GPU, *flags]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the presets that were run; on cores the small one alone, since the other takes minutes there."""
    found = {}
    for preset in ("tiny",) if ON_CORES else ("tiny", "demo"):
        out = tmp_path_factory.mktemp("gpu") / preset
        said = run(*command("pipeline", preset, out))
        assert "held-out accuracy" in said
        assert "runs on" in said
        assert ON_CORES or "driver" in said
        found[preset] = out
    return found


def test_the_chain_ends_with_a_report(finished: dict[str, Path]) -> None:
    for out in finished.values():
        assert (out / "report.html").stat().st_size > 1000
        weights = load_file(out / "sarm" / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_training_that_is_stopped_goes_on(finished: dict[str, Path], tmp_path: Path) -> None:
    """Its optimizer's state goes back to the card: a fused step refuses what lies elsewhere."""
    out = tmp_path / "again"
    run("cp", "-r", str(finished["tiny"]), str(out))
    flags = ("--reward.epochs", "12", "--reward.checkpoint-every-steps", "2", "--redo-from", "train_sarm")
    started = subprocess.Popen(command("train_sarm", "tiny", out, *flags), env=environment(), stdout=subprocess.DEVNULL)
    ended = time.monotonic() + 300
    while not list((out / "training" / "sarm").glob("step-*")) and time.monotonic() < ended:
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=200) == 75
    steps = [int(path.name.removeprefix("step-")) for path in (out / "training" / "sarm").glob("step-*")]
    said = run(*command("train_sarm", "tiny", out, *flags[:-2]))
    assert "train SARM: done" in said
    assert max(steps) > 0
    assert load_file(out / "sarm" / "model.safetensors")["score.weight"].isfinite().all()


def test_bfloat16_keeps_the_order_of_rewards(finished: dict[str, Path]) -> None:
    out = finished[list(finished)[-1]]
    rewards = {}
    for dtype in ("float32", "bfloat16"):
        reader = sarm_reader(out / "sarm", 4096, dtype)
        pairs = sorted((out / "pairs").glob("*.parquet"))
        groups = list(prompt_groups(load_pairs(out / "pairs", "heldout"), reader.chat))
        rows = [row for group in groups for row in group.rows(reader.row_tokens)]
        readings = reader.read(rows)
        both = [
            [readings[group.prompt_id, place].reward for place in (pair.chosen, pair.rejected)]
            for group in groups
            for pair in group.pairs
        ]
        rewards[dtype] = np.array(both)
    assert pairs
    assert sum(pq.read_metadata(path).num_rows for path in pairs) > len(both) > 10
    exact, rounded = rewards["float32"], rewards["bfloat16"]
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] >= 0.999
    same = np.sign(exact[:, 0] - exact[:, 1]) == np.sign(rounded[:, 0] - rounded[:, 1])
    assert same.mean() >= 0.995


def test_the_card_was_used(finished: dict[str, Path]) -> None:
    if ON_CORES:
        pytest.skip("cores stand in for the card")
    assert torch.cuda.is_available()
    import json

    counts = json.loads((finished["demo"] / "activations" / "chat" / "manifest.json").read_text())["counts"]
    assert counts["gpu_memory_gb"] > 0.1
