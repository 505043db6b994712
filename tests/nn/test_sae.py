import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sarm.nn.sae import STANDARDISE_EPS, Codes, _Encode, dense, geometric_median, standardise
from sarm.nn.topk import TopKSae

B, D, S, K = 7, 6, 24, 4


def random_sae(seed: int = 0, d_in: int = D, d_sae: int = S, k: int = K) -> TopKSae:
    """Every parameter random, in float64."""
    generator = torch.Generator().manual_seed(seed)
    sae = TopKSae(d_in, d_sae, k).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return sae


def rows(seed: int = 1, num: int = B, d_in: int = D) -> Tensor:
    return torch.randn(num, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(sae: TopKSae, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(z_BS, x_hat_BD) by the definition, densely."""
    pre_BS = (x_BD - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(pre_BS).scatter(1, pre_BS.topk(sae.k, dim=1).indices, 1.0)
    z_BS = pre_BS.relu() * kept
    return z_BS, z_BS @ sae.W_dec + sae.b_dec


def gradients(loss: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


CASES = {
    "random": lambda sae, x: x,
    "fewer than k positive": lambda sae, x: (sae.b_enc.data.sub_(4.0), x)[1],
    "all negative": lambda sae, x: (sae.b_enc.data.sub_(1e3), x)[1],
    "duplicate rows": lambda sae, x: x[:1].repeat(len(x), 1),
    "one row": lambda sae, x: x[:1],
}


@pytest.mark.parametrize("case", CASES)
def test_codes_reconstruction_and_all_gradients_equal_a_dense_brute_force(case):
    sae = random_sae()
    x = CASES[case](sae, rows()).detach().requires_grad_()
    tensors = (x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    out_BD, out_BS = rows(2, len(x)), rows(3, len(x), S)

    codes = sae(x)
    found = dense(codes, S), sae.decode(codes)
    found_gradients = gradients((found[0] * out_BS).sum() + (found[1] * out_BD).sum(), *tensors)
    wanted = brute_force(sae, x)
    wanted_gradients = gradients((wanted[0] * out_BS).sum() + (wanted[1] * out_BD).sum(), *tensors)

    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(found_gradients, wanted_gradients, rtol=0, atol=1e-12)


def test_the_cases_are_what_they_say():
    counts = {}
    for name, prepare in CASES.items():
        sae = random_sae()
        counts[name] = (brute_force(sae, prepare(sae, rows()))[0] > 0).sum(1)
    assert (counts["random"] == K).all()
    assert (counts["fewer than k positive"] < K).any()
    assert (counts["fewer than k positive"] > 0).any()
    assert (counts["all negative"] == 0).all()


@given(seed=st.integers(0, 10_000), num=st.integers(1, 9), k=st.integers(1, 12), shift=st.floats(-3, 3))
def test_encoding_is_exact_for_any_k_and_any_share_of_positive_latents(seed, num, k, shift):
    sae = random_sae(seed, D, 12, k)
    sae.b_enc.data.add_(shift)
    x = rows(seed + 1, num)
    codes = sae(x)
    wanted_z, wanted_x_hat = brute_force(sae, x)
    torch.testing.assert_close(dense(codes, 12), wanted_z, rtol=0, atol=1e-12)
    torch.testing.assert_close(sae.decode(codes), wanted_x_hat, rtol=0, atol=1e-12)
    assert (codes.values >= 0).all()
    assert (codes.values.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == k for row in codes.indices.tolist())


@pytest.mark.parametrize("shift", [0.0, -1.5])
def test_gradcheck_of_the_encoder(shift):
    generator = torch.Generator().manual_seed(5)
    x, W_SD, b_S = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (10, 4), (10,)))
    inputs = [tensor.requires_grad_() for tensor in (x, W_SD, b_S + shift)]
    assert torch.autograd.gradcheck(lambda x, W, b: _Encode.apply(x, W, b, TopKSae(4, 10, 3).activate)[0], inputs)


@pytest.mark.parametrize("trained", ["x", "W_enc", "b_enc"])
def test_a_gradient_asked_for_alone_is_the_same(trained):
    def gradient(names):
        sae, x = random_sae(), rows()
        tensors = {"x": x, "W_enc": sae.W_enc, "b_enc": sae.b_enc}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in names)
        return gradients(sae(x).values.square().sum(), tensors[trained])[0]

    torch.testing.assert_close(gradient([trained]), gradient(["x", "W_enc", "b_enc"]), rtol=0, atol=0)


def test_the_encoders_layout_in_memory_changes_nothing():
    strided, whole = random_sae(), random_sae()
    whole.W_enc.data = whole.W_enc.data.contiguous()
    assert not strided.W_enc.is_contiguous()
    assert whole.W_enc.is_contiguous()
    found = []
    for sae in (strided, whole):
        x = rows().requires_grad_()
        codes = sae(x)
        loss = (sae.decode(codes) - x).square().sum()
        found.append([codes.values, codes.indices, *gradients(loss, x, sae.W_enc, sae.b_enc)])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_no_batch_by_dictionary_tensor_is_kept_for_the_backward_pass():
    num, d_in, d_sae = 64, 4, 128
    sae = random_sae(0, d_in, d_sae, 2)
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    x = rows(1, num, d_in).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = (sae.decode(sae(x)) - x).square().sum()
    loss.backward()
    assert kept
    assert max(kept) < num * d_sae
    assert max(kept) <= d_sae * d_in


def test_autocast_and_16_bit_inputs_leave_the_encoder_in_float32():
    sae = random_sae().float()
    x = rows().bfloat16()
    wanted = sae(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sae(x)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("k", [0, -1, S + 1])
def test_k_beyond_the_dictionary_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be between 1 and d_sae={S}, got k={k}\. Pass --sae\.k"):
        TopKSae(D, S, k)


def test_parameters_have_saelens_names_and_shapes():
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in TopKSae(D, S, K).named_parameters()}
    assert shapes == {
        "W_enc": ((D, S), torch.float32),
        "b_enc": ((S,), torch.float32),
        "W_dec": ((S, D), torch.float32),
        "b_dec": ((D,), torch.float32),
    }


def test_dense_puts_values_at_their_indices():
    codes = Codes(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[4, 0], [1, 3]]))
    assert dense(codes, 5).tolist() == [[1, 0, 0, 0, 3], [0, 2, 0, 0, 0]]


def test_standardise_matches_hand_numbers():
    # Mean 2, deviations -2 0 2, unbiased variance 8 / 2, so the standard deviation is 2.
    found = standardise(torch.tensor([[0.0, 2.0, 4.0]], dtype=torch.float64))
    expected = torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64) * 2 / (2 + STANDARDISE_EPS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_standardise_adds_eps_to_the_deviation_not_to_the_variance():
    small = torch.tensor([[-1e-6, 0.0, 1e-6]], dtype=torch.float64)
    torch.testing.assert_close(standardise(small), small / 2e-6, rtol=1e-12, atol=0)


def test_standardise_makes_a_constant_row_zero():
    assert standardise(torch.full((2, 5), 3.0)).tolist() == [[0.0] * 5] * 2


@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 100), shift=st.floats(-100, 100))
def test_standardised_rows_do_not_depend_on_scale_and_shift(seed, scale, shift):
    h = rows(seed)
    x = standardise(h * scale + shift)
    torch.testing.assert_close(x, standardise(h), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.mean(1), torch.zeros(B, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        x.square().mean(1), torch.full((B,), (D - 1) / D, dtype=torch.float64), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(("dtype", "result"), [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")])  # fmt: skip
def test_standardise_computes_in_float32_or_wider(dtype, result):
    h = rows().to(getattr(torch, dtype))
    assert standardise(h).dtype == getattr(torch, result)
    torch.testing.assert_close(standardise(h), standardise(h.to(getattr(torch, result))), rtol=0, atol=0)


def test_normalising_gives_decoder_rows_unit_norm_and_keeps_their_direction():
    sae = random_sae()
    before = sae.W_dec.detach().clone()
    sae.normalise_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(S, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(sae.W_dec * before.norm(dim=1, keepdim=True), before, rtol=0, atol=1e-12)


def test_normalising_leaves_a_zero_row_zero():
    sae = random_sae()
    sae.W_dec.data[3] = 0
    sae.normalise_decoder_()
    assert sae.W_dec[3].tolist() == [0.0] * D


def test_the_decoders_gradient_loses_its_parallel_part_and_nothing_else():
    sae = random_sae()
    sae.normalise_decoder_()
    gradient = rows(4, S)
    sae.W_dec.grad = gradient.clone()
    sae.remove_parallel_gradient_()
    along = (sae.W_dec.grad * sae.W_dec).sum(1)
    torch.testing.assert_close(along, torch.zeros(S, dtype=torch.float64), rtol=0, atol=1e-12)
    removed = gradient - sae.W_dec.grad
    coefficients = (removed * sae.W_dec).sum(1, keepdim=True)
    torch.testing.assert_close(removed, coefficients * sae.W_dec, rtol=0, atol=1e-12)


def test_without_a_gradient_there_is_nothing_to_remove():
    sae = random_sae()
    sae.remove_parallel_gradient_()
    assert sae.W_dec.grad is None


def initialised(seed: int = 3) -> tuple[TopKSae, Tensor]:
    sample = (rows(8, 200) * 2 + 1).float()
    sae = TopKSae(D, S, K)
    sae.initialise_(sample, torch.Generator().manual_seed(seed))
    return sae, sample


def test_initialisation_starts_mean_centred_with_a_tied_unit_decoder():
    sae, sample = initialised()
    torch.testing.assert_close(sae.b_dec.data, sample.mean(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(S))
    assert sae.b_enc.tolist() == [0.0] * S
    ratio = sae.W_enc / sae.W_dec.T
    assert ratio.mean() > 0
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()))


def test_no_other_scale_of_the_initial_encoder_reconstructs_better():
    sae, sample = initialised()

    def error(scale):
        other = copy.deepcopy(sae)
        other.W_enc.data.mul_(scale)
        return (other.decode(other(sample)) - sample).square().sum().item()

    assert error(1.0) < min(error(0.99), error(1.01))
    assert error(1.0) < (sample - sae.b_dec).square().sum().item()


def test_initialisation_depends_on_the_generator_alone():
    same, other = initialised(3)[0], initialised(4)[0]
    torch.rand(1)
    assert torch.equal(initialised(3)[0].W_dec, same.W_dec)
    assert not torch.equal(other.W_dec, same.W_dec)


LATENT = 5


def absorbed() -> tuple[TopKSae, TopKSae, Tensor, Tensor]:
    """(before, after, rows far from b_dec, unit direction of their shift); biases zero, as when the chat phase starts early."""
    before = random_sae()
    before.normalise_decoder_()
    before.b_enc.data.zero_()
    shifted = rows(9, 50) * 0.1 + before.b_dec + 3.0
    after = copy.deepcopy(before)
    after.absorb_shift_(shifted, LATENT)
    shift = (shifted.mean(0) - before.b_dec).detach()
    return before, after, shifted, shift / shift.norm()


def pre_acts(sae: TopKSae, x: Tensor) -> Tensor:
    return ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()


@given(amount=st.floats(-100, 100))
def test_after_absorbing_the_other_latents_do_not_see_the_shift(amount):
    _, after, _, unit = absorbed()
    others = [i for i in range(S) if i != LATENT]
    x = rows(10)
    torch.testing.assert_close(
        pre_acts(after, x + amount * unit)[:, others], pre_acts(after, x)[:, others], rtol=0, atol=1e-10
    )


def test_without_absorbing_they_do():
    before, _, _, unit = absorbed()
    assert (pre_acts(before, rows(10) + 3 * unit) - pre_acts(before, rows(10))).abs().mean() > 0.5


def test_the_chosen_latent_carries_the_shift():
    before, after, shifted, unit = absorbed()
    mean = shifted.mean(0, keepdim=True)
    size = (mean - before.b_dec).norm()
    torch.testing.assert_close(pre_acts(after, mean)[0, LATENT], size.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(after.W_dec[LATENT], unit, rtol=0, atol=1e-12)
    assert after.b_enc[LATENT] == 0


def test_absorbing_reconstructs_the_mean_of_the_shifted_rows():
    before, after, shifted, _ = absorbed()
    mean = shifted.mean(0, keepdim=True)
    torch.testing.assert_close(after.decode(after(mean)), mean, rtol=0, atol=1e-12)
    assert (before.decode(before(mean)) - mean).norm() > 0.1


def test_absorbing_changes_no_decoder_row_but_one():
    before, after, _, _ = absorbed()
    changed = (before.W_dec != after.W_dec).any(1)
    assert changed.nonzero().flatten().tolist() == [LATENT]
    assert torch.equal(before.b_dec, after.b_dec)


def test_the_geometric_median_has_the_least_sum_of_distances_and_shrugs_off_an_outlier():
    x = torch.cat([rows(11, 40), rows(12, 1) + 1000.0]).float()
    median = geometric_median(x, steps=200)

    def distances(point):
        return (x - point).norm(dim=1).sum()

    for direction in rows(13, 20).float():
        assert distances(median) <= distances(median + 0.01 * direction) + 1e-3
    assert median.norm() < 1 < x.mean(0).norm()


def test_b_dec_starts_at_the_centre_that_is_asked_for():
    sample = torch.cat([rows(11, 40), rows(12, 1) + 100.0]).float()
    for name, centre in (("mean", sample.mean(0)), ("geometric_median", geometric_median(sample))):
        sae = TopKSae(D, S, K)
        sae.initialise_(sample, torch.Generator().manual_seed(0), name)
        torch.testing.assert_close(sae.b_dec.data, centre)


def test_signed_topk_keeps_negative_latents_where_fewer_than_k_are_positive():
    signed = TopKSae(D, S, K, signed=True)
    signed.load_state_dict(random_sae().state_dict())
    signed.double().b_enc.data.sub_(1e3)
    codes = signed(rows())
    pre = (rows() - signed.b_dec) @ signed.W_enc + signed.b_enc
    assert (codes.values < 0).all()
    torch.testing.assert_close(codes.values, pre.topk(K).values, rtol=1e-12, atol=0)
