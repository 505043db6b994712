"""The sparse products on the card against float64 on the CPU; the same twice, bit for bit."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sarm.nn.backends import TorchBackend, backend_for
from sarm.nn.bags import Bags
from sarm.nn.selection import largest

pytestmark = pytest.mark.gpu
SHAPES = {
    "odd width": (7, 61, 9, 3),
    "wide": (33, 4096, 512, 24),
    "above a block": (5, 1025, 40, 4),
    "one latent in all rows": (64, 48, 1, 1),
    "one row": (1, 16, 8, 2),
}


class Case(NamedTuple):
    """A step's entries: B rows of K latents each, in shape B, D, S, K."""

    bags: Bags
    x: Tensor
    grad: Tensor
    weights: Tensor
    values: Tensor
    pre_grads: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Case":
        bags = Bags(*(part.to(device) for part in self.bags))
        return Case(bags, *(part.to(device, dtype) for part in self[1:]))


def case(name: str) -> Case:
    B, D, S, K = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    latents = torch.cat([torch.randperm(S, generator=generator)[:K] for _ in range(B)])
    rows = torch.arange(B).repeat_interleave(K)
    bags = Bags(latents=latents, rows=rows, bags=rows, offsets=torch.arange(0, B * K, K))
    return Case(bags, normal(B, D), normal(B, D), normal(S, D), normal(B * K), normal(B * K))


def products(of: Case, backend: object) -> list[Tensor]:
    decoded = backend.decode(of.weights, of.values, of.bags)  # type: ignore[attr-defined]
    gradients = backend.value_gradients(of.grad, of.weights, of.bags)  # type: ignore[attr-defined]
    weights = backend.weight_gradients(of.x, of.grad, of.pre_grads, of.values, of.bags, len(of.weights))  # type: ignore[attr-defined]
    return [decoded, gradients, *weights]


@pytest.mark.parametrize("name", SHAPES)
def test_products_are_those_of_float64(name: str, card: torch.device) -> None:
    exact = products(case(name), TorchBackend())
    found = products(case(name).to(card, torch.float32), backend_for(card))
    for ours, wanted in zip(found, exact, strict=True):
        scale = wanted.abs().max().clamp_min(1)
        assert (ours.cpu().double() - wanted).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_products_twice_are_equal_bit_for_bit(name: str, card: torch.device) -> None:
    of = case(name).to(card, torch.float32)
    for one, other in zip(products(of, backend_for(card)), products(of, backend_for(card)), strict=True):
        assert torch.equal(one, other)


def test_rows_without_a_latent_decode_to_nothing(card: torch.device) -> None:
    none = torch.zeros(0, dtype=torch.long, device=card)
    bags = Bags(latents=none, rows=none, bags=none, offsets=torch.zeros(3, dtype=torch.long, device=card))
    found = backend_for(card).decode(torch.randn(8, 5, device=card), torch.zeros(0, device=card), bags)
    assert torch.equal(found.cpu(), torch.zeros(3, 5))


@pytest.mark.parametrize(("width", "k"), [(4096, 32), (65536, 192), (96, 6)])
def test_the_largest_are_those_of_a_whole_search(width: int, k: int, card: torch.device) -> None:
    pre = torch.randn(64, width, device=card, generator=torch.Generator(card).manual_seed(0))
    values, indices = largest(pre, k)
    wanted = torch.topk(pre, k, dim=1)
    assert torch.equal(values, wanted.values)
    assert torch.equal(pre.gather(1, indices), wanted.values)
