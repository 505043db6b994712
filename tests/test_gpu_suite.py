"""The tests and figures for machines with a GPU are alive on machines without one, where they say in a line that they are skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there the suite itself runs: make test-gpu")


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600, check=False)  # fmt: skip


@without_gpu
def test_figures_are_skipped_in_one_line_without_a_gpu(tmp_path: Path) -> None:
    done = run("tests/bench/gpu/bench_gpu.py", "--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        f"skipped: torch {torch.__version__} sees no GPU. --small runs the same on cores."
    ]
    assert not (tmp_path / "gpu.json").exists()


@without_gpu
def test_figures_name_card_driver_and_torch_and_say_which_library_is_missing(tmp_path: Path) -> None:
    command = ["tests/bench/gpu/bench_gpu.py", "--small", "--parts", "sae", "parquet", "--peers", tmp_path / "none" / "bin" / "python", "--openai", ""]  # fmt: skip
    done = run(*command, "--out", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"].keys() >= {"card", "driver", "torch"}
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["is_small"]
    figures = ("sae_step_ms_64", "sae_bare_product_ms", "sae_decode_ms", "sae_weight_gradients_ms", "parquet_to_device_gb_s", "parquet_verified_and_held_gb_s")  # fmt: skip
    assert all(found[name] > 0 for name in figures)
    skipped = [line for line in done.stdout.splitlines() if line.startswith("skipped: ")]
    assert [line.split()[1].strip(",") for line in skipped] == ["OpenAI's", "sparsify", "sae_lens"]


@without_gpu
def test_tests_are_skipped_with_the_number_of_gpus_that_they_need() -> None:
    done = run("-m", "pytest", "tests/gpu", "-rs", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" not in done.stdout
    reasons = {line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("SKIPPED")}
    assert any(reason.startswith("needs 1 GPU, and torch") for reason in reasons)
    assert any(reason.startswith("needs 2 GPUs, and torch") for reason in reasons)


@without_gpu
def test_the_tests_themselves_pass_where_cores_stand_in_for_the_card() -> None:
    files = ["tests/gpu/test_sparse_products.py", "tests/gpu/test_screening.py", "tests/gpu/test_environment.py"]
    done = run("-m", "pytest", *files, "-m", "not gpu2", "-p", "no:cacheprovider", SARM_GPU_TESTS="cpu")
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout
