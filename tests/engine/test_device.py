"""A GPU that Ray gives and torch cannot use is refused; Ray's GPUs here are numbers that nothing stands behind."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sarm.engine.ray.device import why_unusable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("build", "cuda", "driver", "words"),
    [
        ("2.13.0+cpu", None, "580.1", ["2.13.0+cpu", "without CUDA", "Install torch's CUDA build"]),
        ("2.13.0+cu130", "13.0", "", ["no NVIDIA driver", "CUDA 13.0"]),
        ("2.13.0+cu130", "13.0", "470.82", ["470.82", "CUDA 13.0", "newer driver"]),
    ],
)
def test_what_is_missing_is_said_with_what_to_install(build, cuda, driver, words):
    said = why_unusable(build, cuda, driver, "3")
    assert said.startswith(f"Ray gave this worker GPU 3, and torch {build} sees none")
    assert all(word in said for word in [*words, "--use-gpu no"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a GPU that Ray gives can be used")
def test_no_job_works_on_the_cpu_and_holds_a_gpu(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")
    }
    environment |= {"RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'}

    def job(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, f"jobs/{name}.py", "tiny", "--out", str(tmp_path / "out"), *flags]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400, check=False
        )

    refused = job("extract_activations")
    assert not list((tmp_path / "out" / "activations").rglob("part-*")), "nothing was computed"
    done = job("extract_activations", "--use-gpu", "no")
    assert done.returncode == 0, done.stderr[-3000:]
    trained = job("train_sae", "--only")
    for one in (refused, trained):
        assert one.returncode == 2, one.stderr[-3000:]
        last = one.stderr.strip().splitlines()[-1]
        # The node's address is named first.
        assert re.match(
            rf"error: \S+: Ray gave this worker GPU 0, and torch {re.escape(torch.__version__)} sees none", last
        ), one.stderr[-3000:]
