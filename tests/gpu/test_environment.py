"""What must be there before anything else is tried: a driver, kernels for the card, a compiler, Ray's count of GPUs."""

import os
import subprocess
import sys

import pytest
import torch
from tests.gpu.cards import ON_CORES

from sarm.nn.backends import TorchBackend, backend_for, why_not_launched
from sarm.nn.device_facts import compiler, device_facts

pytestmark = pytest.mark.gpu
# Apart, since a process has one cluster.
COUNTED = """
import ray
with ray.init(address="local", include_dashboard=False, log_to_driver=False):
    print(int(ray.cluster_resources().get("GPU", 0)))
"""


def test_torch_has_kernels_for_the_card_and_a_product_is_right(card: torch.device) -> None:
    facts = device_facts(card)
    assert facts.refusal == ""
    a, b = torch.randn(64, 48, device=card, dtype=torch.float64), torch.randn(48, 32, device=card, dtype=torch.float64)
    torch.testing.assert_close((a @ b).cpu(), a.cpu() @ b.cpu())
    assert facts.notes == (), "nothing slows it"


@pytest.mark.skipif(ON_CORES, reason="cores take PyTorch's own kernels")
def test_triton_has_a_compiler_and_launches(card: torch.device) -> None:
    assert compiler(), "install gcc and libc6-dev"
    backend = backend_for(card)
    assert not isinstance(backend, TorchBackend)
    assert why_not_launched(backend, card) == ""


@pytest.mark.skipif(ON_CORES, reason="cores are no GPUs to Ray")
def test_ray_counts_the_gpus_that_torch_sees() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, env=environment, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) == torch.cuda.device_count()


@pytest.mark.gpu2
def test_nccl_is_there_for_two(card: torch.device) -> None:
    assert ON_CORES or torch.distributed.is_nccl_available()
