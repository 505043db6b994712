"""The registry, and what is particular to AbsTopK and matching pursuit; `every_sae` holds the definitions that all are compared with."""

import dataclasses
import itertools
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.nn.every_sae import DEFINITIONS, KINDS, kind_of
from torch import Tensor
from transformers.dynamic_module_utils import get_relative_import_files

from sarm.nn import modeling_sarm
from sarm.nn.abs_topk import AbsTopKSae
from sarm.nn.architectures import ARCHITECTURES, OPTIONS, build_sae
from sarm.nn.matching_pursuit import MatchingPursuitSae, _Pursue
from sarm.nn.modeling_sarm import CODE_FILES
from sarm.nn.sae import Codes, Sae, dense
from sarm.nn.topk import TopKSae
from sarm.settings.sae import SaeSettings

B, D, S, K = 9, 6, 20, 4


def random_sae(architecture: str, seed: int = 0, k: int = K) -> Sae:
    """In float64, with unit decoder rows and every other parameter random."""
    sae = build_sae(**kind_of(architecture), d_in=D, d_sae=S, k=k).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    sae.normalise_decoder_()
    return sae


def rows(seed: int = 1, num: int = B) -> Tensor:
    return 2 * torch.randn(num, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_settings_offer_every_architecture_and_every_option():
    hints = get_type_hints(SaeSettings)
    assert get_args(hints["architecture"]) == tuple(ARCHITECTURES)
    assert set(OPTIONS) <= {field.name for field in dataclasses.fields(SaeSettings)}
    assert DEFINITIONS.keys() == ARCHITECTURES.keys(), "and `every_sae` defines every one"


def test_an_exported_model_carries_every_file_that_its_code_imports():
    own = modeling_sarm.__file__
    assert {Path(own).name, *(Path(path).name for path in get_relative_import_files(own))} == set(CODE_FILES)
    assert len(set(CODE_FILES)) == len(CODE_FILES)


@pytest.mark.parametrize("architecture", KINDS)
def test_a_description_builds_the_same_sae_again(architecture):
    sae = random_sae(architecture)
    again = build_sae(d_in=D, d_sae=S, k=K, **sae.describe())
    assert (type(again), again.exported_as, again.describe()) == (type(sae), sae.exported_as, sae.describe())


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match="no SAE architecture 'gated', known are topk"):
        build_sae("gated", D, S, K)


@pytest.mark.parametrize("trained", ["x", "parameters"])
@pytest.mark.parametrize(
    "architecture", [name for name in KINDS if name not in ("batch_topk", "matryoshka", "jumprelu")]
)
def test_gradients_of_codes_and_reconstruction_are_those_of_dense_autograd(architecture, trained):
    """As a reward model asks for them: of values and of x_hat, for rows or for weights."""
    sae = random_sae(architecture)
    x = rows().requires_grad_(trained == "x")
    asked = [x] if trained == "x" else list(sae.parameters())
    out_BS, out_BD = torch.randn(B, S, dtype=torch.float64), rows(3)
    codes = sae(x)
    z, _ = DEFINITIONS[sae.architecture](sae, x)
    found, wanted = (dense(codes, S), sae(codes)), (z, z @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((a * out_BS).sum() + (b * out_BD).sum(), asked) for a, b in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", KINDS)
def test_an_absorbed_shift_moves_one_latent_and_no_other(architecture):
    """In float32, as it is done: rows that lie apart by the shift alone have the same other latents."""
    sae = build_sae(**kind_of(architecture), d_in=D, d_sae=S, k=S)
    text = torch.randn(300, D, generator=torch.Generator().manual_seed(4))
    sae.initialise_(text, torch.Generator().manual_seed(5))
    shift = torch.tensor([3.0, -2.0, 1.0, 0.0, 0.0, 2.0])
    sae.absorb_shift_(text + shift - text.mean(0) + sae.b_dec.detach(), 7)
    codes = [dense(sae(text + times * shift), S).detach() for times in (1.0, 2.0)]
    carried = (codes[1] - codes[0])[:, 7]
    assert carried.mean() > 1
    codes[0][:, 7] = codes[1][:, 7] = 0
    torch.testing.assert_close(codes[0], codes[1], rtol=0, atol=1e-3)


def test_abs_topk_by_hand():
    sae = AbsTopKSae(2, 3, 2)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0.0, -1.0]))
        sae.W_dec.copy_(torch.eye(2).repeat(2, 1)[:3])
        sae.b_dec.copy_(torch.tensor([1.0, 1.0]))
    # x - b_dec = (-3, 2), so that pre = (-3, 2, -1.5).
    codes = sae(torch.tensor([[-2.0, 3.0]]))
    assert codes.values.tolist() == [[-3.0, 2.0]]
    assert codes.indices.tolist() == [[0, 1]]
    assert sae(codes).tolist() == [[-2.0, 3.0]]


@given(seed=st.integers(0, 1000), num=st.integers(1, 9), k=st.integers(1, S), shift=st.floats(-3, 3))
def test_abs_topk_is_topk_over_every_direction_and_its_opposite(seed, num, k, shift):
    sae = random_sae("abs_topk", seed, k)
    sae.b_enc.data.add_(shift)
    both = sae.unfolded()
    assert (type(both), both.d_sae, both.k, both.W_dec.dtype) == (TopKSae, 2 * S, k, sae.W_dec.dtype)
    x = rows(seed + 1, num)
    codes, doubled = sae(x), dense(both(x), 2 * S)
    torch.testing.assert_close(dense(codes, S), doubled[:, :S] - doubled[:, S:], rtol=0, atol=1e-12)
    torch.testing.assert_close(sae(codes), both(both(x)), rtol=0, atol=1e-12)
    assert (codes.values.abs().diff(dim=1) <= 0).all()


def pursuit(W_SD: Tensor, k: int) -> MatchingPursuitSae:
    sae = MatchingPursuitSae(W_SD.shape[1], len(W_SD), k).to(W_SD.dtype)
    with torch.no_grad():
        sae.W_dec.copy_(W_SD)
        sae.b_dec.zero_()
    return sae


def pursued_one_by_one(sae: Sae, x_D: Tensor) -> tuple[dict[int, float], list[float]]:
    """(value of each active latent, squared length of what is left after each step), in Python's floats."""
    rest, W = (x_D - sae.b_dec).tolist(), sae.W_dec.tolist()
    z: dict[int, float] = {}
    left = [sum(r * r for r in rest)]
    for _ in range(sae.k):
        projected = [sum(r * w for r, w in zip(rest, row, strict=True)) for row in W]
        best = max(range(len(W)), key=lambda i: projected[i])
        value = max(projected[best], 0.0)
        if value > 0:
            z[best] = z.get(best, 0.0) + value
        rest = [r - value * w for r, w in zip(rest, W[best], strict=True)]
        left.append(sum(r * r for r in rest))
    return z, left


@given(seed=st.integers(0, 1000), k=st.integers(1, 12))
def test_matching_pursuit_is_the_greedy_loop_and_each_step_leaves_no_more(seed, k):
    sae, x = random_sae("matching_pursuit", seed, k), rows(seed + 1)
    with torch.no_grad():
        codes = sae(x)
        x_hat, z = sae(codes), dense(codes, S)
    for row in range(B):
        values, left = pursued_one_by_one(sae, x[row])
        assert {i: float(z[row, i]) for i in z[row].nonzero().flatten().tolist()} == pytest.approx(values, abs=1e-10)
        assert float((x[row] - x_hat[row]).square().sum()) == pytest.approx(left[-1], abs=1e-10)
        assert all(after <= before + 1e-12 for before, after in itertools.pairwise(left))
    assert (codes.values >= 0).all()
    assert (codes.values.diff(dim=1) <= 0).all()


def test_a_latent_that_is_chosen_twice_adds_up_and_is_active_once():
    half = 0.5**0.5
    sae = pursuit(torch.tensor([[1.0, 0.0], [half, half]], dtype=torch.float64), k=2)
    x = torch.tensor([[6.0, -1.0]], dtype=torch.float64)
    # <x, w_0> = 6, which leaves (0, -1): nothing is near.
    assert dense(sae(x), 2).tolist() == [[6.0, 0.0]]
    # <x, w_1> = 3 sqrt(2) leaves (1, -1), of which w_0 takes (1, 0).
    x = torch.tensor([[4.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(dense(sae(x), 2).detach(), torch.tensor([[1.0, 6 * half]], dtype=torch.float64))
    # In three dimensions the third step can come back to the first latent.
    third = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [-0.6, 0.8, 0.0]], dtype=torch.float64), dim=1)
    sae, x = pursuit(third, k=2), torch.tensor([[3.0, 4.0, 0.0]], dtype=torch.float64)
    sae.k = 3
    # 3 w_0 leaves (0, 4): 3.2 w_1 leaves (1.92, 1.44): 1.92 w_0 again.
    codes = sae(x)
    torch.testing.assert_close(dense(codes, 2).detach(), torch.tensor([[4.92, 3.2]], dtype=torch.float64))
    assert (codes.values != 0).sum() == 2


def test_matching_pursuit_takes_apart_directions_that_resemble_each_other():
    """TopK's encoder sees both, whichever is there; what the first step leaves shows only one."""
    close = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4359, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    codes = dense(pursuit(close, 2)(2 * close[:1] + 1.5 * close[2:]), 3)
    torch.testing.assert_close(codes, torch.tensor([[2.0, 0.0, 1.5]]))


def test_rows_without_a_near_direction_have_no_codes_and_no_gradient():
    sae = pursuit(torch.nn.functional.normalize(torch.rand(S, D, generator=torch.Generator().manual_seed(0)), dim=1), K)
    x = (-torch.rand(3, D)).requires_grad_()
    codes = sae(x)
    assert not codes.values.any()
    codes.values.sum().backward()
    assert not x.grad.any()
    assert not sae.W_dec.grad.any()


def test_gradcheck_of_matching_pursuit():
    generator = torch.Generator().manual_seed(5)
    x, W = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 3), (30, 3)))
    inputs = [x.requires_grad_(), torch.nn.functional.normalize(W, dim=1).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, W: _Pursue.apply(x, W, 5, None)[::2], inputs)


def test_codes_that_name_a_latent_twice_add_up():
    codes = Codes(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[3, 1, 3]]))
    assert dense(codes, 5).tolist() == [[0.0, 1.0, 0.0, 2.0, 0.0]]
