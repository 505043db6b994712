"""An SAE's training on the card beside the same on the CPU, and resumed."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tests.gpu.cards import ON_CORES
from torch import Tensor

from sarm.nn.topk import TopKSae
from sarm.settings.sae import SaeSettings
from sarm.training.sae_learner import Learner

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
D, S, K, B, STEPS, LR = 64, 512, 8, 96, 50, 5e-3


def rows(step: int) -> Tensor:
    """Sums of a few of a hundred directions, which a dictionary can find."""
    directions = torch.randn(100, D, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(step)
    parts = torch.rand(B, 100, generator=generator) * (torch.rand(B, 100, generator=generator) < 0.04)
    return parts @ directions + 0.05 * torch.randn(B, D, generator=generator)


def far_apart(one: Tensor, other: Tensor) -> float:
    """The distance in units of the first's norm."""
    one, other = one.detach().cpu(), other.detach().cpu()
    return float((one - other).norm() / one.norm())


def fresh(device: torch.device | str, split: Any = "rows") -> Learner:
    sae = TopKSae(D, S, K)
    sae.initialise_(rows(999), torch.Generator().manual_seed(0))
    return Learner(sae, SaeSettings(d_sae=S, k=K, batch_size=B), device, split)


def trained(learner: Learner, device: torch.device | str, first: int = 0, steps: int = STEPS) -> list[float]:
    return [float(learner.step(rows(step).to(device), LR)) for step in range(first, first + steps)]


def test_fifty_steps_on_the_card_are_those_of_the_cpu(card: torch.device) -> None:
    ours, plain = fresh(card), fresh("cpu")
    losses = trained(ours, card), trained(plain, "cpu")
    # Sums in another order: a latent at the edge of the active ones may be another.
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=0)
    assert losses[0][-1] < 0.9 * losses[0][0], "it learns"
    assert far_apart(plain.sae.W_dec, ours.sae.W_dec) < 0.01


def test_a_training_goes_on_bit_for_bit(card: torch.device) -> None:
    whole, half = fresh(card), fresh(card)
    trained(whole, card)
    trained(half, card, 0, STEPS // 2)
    again = fresh(card)
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    trained(again, card, STEPS // 2, STEPS - STEPS // 2)
    for (name, one), other in zip(whole.sae.state_dict().items(), again.sae.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def _worker(rank: int, folder: str, split: str) -> None:
    backend, device = ("gloo", "cpu") if ON_CORES else ("nccl", f"cuda:{rank}")
    torch.set_num_threads(1)
    if ON_CORES:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/{split}", rank=rank, world_size=2)
    learner = fresh(device, split)
    losses = trained(learner, device)
    whole = learner.whole()
    if rank == 0:
        torch.save(
            (losses, {name: tensor.cpu() for name, tensor in whole.state_dict().items()}), f"{folder}/{split}.pt"
        )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu2
@pytest.mark.parametrize("split", ["rows", "latents"])
def test_two_cards_learn_what_one_learns(
    split: str, card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Spawned processes import this file by its name from the repository's root.
    monkeypatch.syspath_prepend(str(ROOT))
    mp.spawn(_worker, (str(tmp_path), split), nprocs=2)
    losses, weights = torch.load(tmp_path / f"{split}.pt")
    one = fresh(card)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(trained(one, card)), rtol=1e-3, atol=0)
    assert far_apart(one.sae.W_dec, weights["W_dec"]) < 0.01
