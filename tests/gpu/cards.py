"""The device that the tests of this folder run on: a GPU; with SARM_GPU_TESTS=cpu the cores, to see that the tests themselves are alive."""

import os

import torch

ON_CORES = os.environ.get("SARM_GPU_TESTS") == "cpu"


def device() -> torch.device:
    return torch.device("cpu" if ON_CORES else "cuda")


def num_cards() -> int:
    """How many GPUs torch sees; two where the cores stand in for them."""
    return 2 if ON_CORES else torch.cuda.device_count()


def why_skipped(needed: int) -> str:
    """Why a test that needs so many GPUs cannot run here; '' if it can."""
    if num_cards() >= needed:
        return ""
    build = f"torch {torch.__version__}"
    return f"needs {needed} GPU{'s' * (needed > 1)}, and {build} sees {num_cards()}: `make test-gpu` on a machine that has {'them' if needed > 1 else 'one'}"
