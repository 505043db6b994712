"""The screened k largest on the card against float64, where TF32 is allowed around them."""

from collections.abc import Iterator

import pytest
import torch
from tests.gpu.cards import ON_CORES
from tests.nn.test_screening import K, rows_and_encoder

from sarm.nn.precision import allow_tf32_
from sarm.nn.screening import Screen

pytestmark = pytest.mark.gpu
# Rows that the screen may leave to a whole search.
UNPROVED = ("norms", "offset", "tiny")


@pytest.fixture(autouse=True)
def _tf32() -> Iterator[None]:
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    allow_tf32_()
    yield
    assert products.allow_tf32, "as it was before the screen"
    products.allow_tf32 = before


def assert_largest(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int, card: torch.device, *, must: bool
) -> None:
    x, W, b = (part.to(card) for part in (x, W, b))
    found = Screen().largest(x, W, b, k)
    if found is None:
        assert not must
        return
    values, latents = found
    exact = torch.addmm(b.double(), x.double(), W.double().T)
    wanted = exact.topk(k, dim=1).values
    assert (latents.sort(dim=1).values.diff(dim=1) > 0).all(), "a latent was taken twice"
    # What float32 rounds away in a sum of as many products.
    slack = 1e-6 * (x.norm(dim=1, keepdim=True) * W.norm(dim=1).max() + b.abs().max()).double()
    assert ((exact.gather(1, latents) - wanted).abs() <= slack).all()
    assert ((values.double() - wanted).abs() <= slack).all()


@pytest.mark.parametrize("kind", ["plain", "biases", "norms", "offset", "some rows too close to tell", "tiny"])
def test_the_screened_largest_are_the_largest(kind: str, card: torch.device) -> None:
    assert_largest(*rows_and_encoder(kind), K, card, must=kind not in UNPROVED)


@pytest.mark.skipif(ON_CORES, reason="the papers' largest shape takes a core minutes")
def test_so_are_those_of_the_papers_largest_dictionary(card: torch.device) -> None:
    generator = torch.Generator(card).manual_seed(0)
    x, W = (torch.randn(n, 4096, device=card, generator=generator) for n in (512, 65536))
    assert_largest(x, W / 64, torch.zeros(65536, device=card), 192, card, must=True)
