"""The sparse step against dense autograd of the definition, in float64, for every architecture and backend."""

import importlib.util
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.nn.every_sae import DEFINITIONS, KINDS, auxk_by_definition, kind_of
from torch import Tensor

from sarm.nn.architectures import build_sae
from sarm.nn.backends import Backend, TorchBackend, backend_for, why_not_launched
from sarm.nn.batch_topk import BatchTopKRule
from sarm.nn.sae import Sae, dense
from sarm.nn.selection import Share, largest
from sarm.nn.sparse import Plan, Workspace, reconstruct
from sarm.nn.thresholds import ThresholdSae

B, D, S, K = 9, 5, 24, 3
DEAD = [2, 3, 11, 17, 23]


def random_sae(architecture: str, seed: int = 0, k: int = K) -> Sae:
    """Every parameter random, in float64; thresholds around 1, so that many pre-activations are near theirs."""
    generator = torch.Generator().manual_seed(seed)
    sae = build_sae(**kind_of(architecture), d_in=D, d_sae=S, k=k, prefixes=(6, 12), bandwidth=0.8).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        if isinstance(sae, ThresholdSae):
            sae.threshold.copy_(1 + 0.3 * torch.rand(S, generator=generator, dtype=torch.float64))
    if sae.is_tied:
        sae.normalise_decoder_()
    return sae


def rows(seed: int = 1, num: int = B) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plan_for(sae: Sae, num: int, backend: Backend, aux_k: int = 0, chunk: int = 2 * S, dead: list[int] = DEAD) -> Plan:
    share = Share(num, num)
    return Plan(
        sae.rule(share),
        Workspace(backend, chunk),
        share,
        prefixes=sae.prefixes,
        dead=torch.tensor(dead, dtype=torch.long) if aux_k else None,
        aux_rule=sae.aux_rule(aux_k, share) if aux_k else None,
    )


def dead_of(sae: Sae, x: Tensor) -> list[int]:
    """Where latents are chosen one after the other, none that is active: the last one is at right angles to what it leaves, a sign of nothing."""
    if not sae.is_tied:
        return DEAD
    return (DEFINITIONS[sae.architecture](sae, x)[0] == 0).all(0).nonzero().flatten().tolist()[:5]


def dense_reference(sae: Sae, x: Tensor, aux_k: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """(x_hat_GBD, error_hat_BD, l0_B) by the definitions, with B x S tensors and plain autograd."""
    z, gates = DEFINITIONS[sae.architecture](sae, x)
    x_hat = torch.stack([z[:, :end] @ sae.W_dec[:end] + sae.b_dec for end in (*sae.prefixes, S)])
    return x_hat, auxk_by_definition(sae, x, z, dead_of(sae, x), aux_k) if aux_k else None, gates.sum(1)


def weighted(x_hat: Tensor, error_hat: Tensor | None, l0: Tensor) -> Tensor:
    """A loss in which every output has a gradient of its own."""
    generator = torch.Generator().manual_seed(77)
    total = torch.zeros((), dtype=torch.float64)
    for part in (x_hat, error_hat, l0):
        if part is not None:
            total = total + (part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum()
    return total


def compare(sae: Sae, x: Tensor, backend: Backend, aux_k: int, chunk: int = 2 * S) -> None:
    x = x.detach().requires_grad_()
    tensors = [x, *sae.parameters()]
    found = reconstruct(sae, x, plan_for(sae, len(x), backend, aux_k, chunk, dead_of(sae, x)))
    wanted = dense_reference(sae, x, aux_k)
    torch.testing.assert_close(found.x_hat, wanted[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.l0, wanted[2], rtol=0, atol=0)
    assert (found.error_hat is None) == (aux_k == 0)
    losses = weighted(found.x_hat, found.error_hat, found.l0), weighted(*wanted)
    # Without any active latent, the dense loss does not depend on x.
    gradients = [torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True) for loss in losses]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


CASES = {
    "random": lambda sae, x: x,
    "fewer than k positive": lambda sae, x: (sae.b_enc.data.sub_(4.0), x)[1],
    "all negative": lambda sae, x: (sae.b_enc.data.sub_(1e3), x)[1],
    "all directions point away": lambda sae, x: (sae.W_dec.data.abs_(), sae.b_dec.data.zero_(), -x.abs())[2],
    "duplicate rows": lambda sae, x: x[:1].repeat(len(x), 1),
    "one row": lambda sae, x: x[:1],
    "one row far from the others": lambda sae, x: torch.cat([x[:1] * 30, x[1:]]),
}


@pytest.mark.parametrize("aux_k", [0, 2, 20])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", KINDS)
def test_outputs_and_all_gradients_equal_dense_autograd(architecture, case, aux_k):
    sae = random_sae(architecture)
    compare(sae, CASES[case](sae, rows()), TorchBackend(), aux_k)


@given(
    architecture=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    num=st.integers(1, 12),
    k=st.integers(1, 8),
    shift=st.floats(-3, 3),
    aux_k=st.integers(0, 6),
    chunk=st.integers(1, 12 * S),
)
def test_any_sizes_chunks_and_shares_of_positive_latents(architecture, seed, num, k, shift, aux_k, chunk):
    sae = random_sae(architecture, seed, k if architecture != "matryoshka" else min(k, 6))
    sae.b_enc.data.add_(shift)
    # An infinite gradient does not exist, but a pre-activation within rounding of its threshold does: none is that near.
    compare(sae, rows(seed + 1, num), TorchBackend(), aux_k, chunk)


def test_equal_latents_of_one_row_are_told_apart():
    """Latents that are copies of each other have equal pre-activations, of which TopK may take either, but K in all."""
    sae = random_sae("topk")
    sae.W_enc.data[:, 1::2], sae.b_enc.data[1::2] = sae.W_enc.data[:, 0::2], sae.b_enc.data[0::2]
    found = reconstruct(sae, rows(), plan_for(sae, B, TorchBackend()))
    for row in range(B):
        latents = found.entries.latents[found.entries.rows == row].tolist()
        assert len(latents) == len(set(latents)) == K


@given(
    seed=st.integers(0, 1000), k=st.integers(1, 6), width=st.sampled_from([16, 100, 384, 400]), num=st.integers(0, 300)
)
def test_the_largest_are_those_of_topk_at_any_width(seed, k, width, num):
    pre = torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(largest(pre, k), tuple(pre.topk(k, dim=1)), rtol=0, atol=0)


def test_the_largest_of_equal_values_are_k_different_latents():
    values, indices = largest(torch.ones(5, 384), 4)
    assert (values == 1).all()
    assert all(len(set(row)) == 4 for row in indices.tolist())


def test_batch_topk_finds_rows_with_more_than_four_times_the_average():
    sae = random_sae("batch_topk", k=1)
    x = torch.cat([rows(1, 1) * 100, rows(2, 11) * 0.01])
    sae.b_dec.data.zero_()
    found = reconstruct(sae, x, plan_for(sae, 12, TorchBackend()))
    assert (found.entries.rows == 0).sum() > 4
    compare(sae, x, TorchBackend(), 0)


@pytest.mark.parametrize("architecture", KINDS)
def test_codes_out_of_training_are_those_of_a_step(architecture):
    sae, x = random_sae(architecture), rows()
    plan = plan_for(sae, B, TorchBackend())
    entries = reconstruct(sae, x, plan).entries
    if isinstance(plan.rule, BatchTopKRule):
        sae.threshold.fill_(plan.rule.threshold - 1e-9)
    wanted = torch.zeros(B, S, dtype=torch.float64).index_put_((entries.rows, entries.latents), entries.values)
    codes = sae(x)
    torch.testing.assert_close(dense(codes, S), wanted, rtol=0, atol=1e-12)
    for values, latents in zip(codes.values, codes.indices, strict=True):
        active = latents[values != 0].tolist()
        assert len(set(active)) == len(active), "a latent is active once"
    assert (codes.values.abs().diff(dim=1) <= 0).all()


@pytest.mark.parametrize("architecture", KINDS)
def test_auxk_reaches_dead_latents_and_no_others(architecture):
    sae = random_sae(architecture)
    sae.b_enc.data.add_(3.0)
    found = reconstruct(sae, rows(), plan_for(sae, B, TorchBackend(), aux_k=4))
    (found.error_hat - rows(5)).square().sum().backward()
    gradients = {
        name: parameter.grad for name, parameter in sae.named_parameters() if name in ("W_enc", "b_enc", "W_dec")
    }
    for name, gradient in gradients.items():
        gradient = gradient.T if name == "W_enc" else gradient.view(S, -1)
        reached = gradient.abs().sum(1).nonzero().flatten().tolist()
        assert reached == DEAD


@pytest.mark.parametrize("architecture", KINDS)
def test_nothing_kept_for_the_backward_pass_has_a_row_for_each_latent_and_each_row(architecture):
    num = 64
    sae = random_sae(architecture)
    sae.b_enc.data.sub_(2)
    kept: list[int] = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = reconstruct(sae, rows(1, num), plan_for(sae, num, TorchBackend(), aux_k=2))
        loss = weighted(found.x_hat, found.error_hat, found.l0)
    loss.backward()
    entries = num * (4 * K + 2)
    assert kept
    assert max(kept) <= max(entries, 4 * num * D) < num * S


def test_the_workspace_keeps_one_chunk_however_many_rows_and_latents_there_are():
    workspace = Workspace(TorchBackend(), chunk_values=100)
    like = torch.empty(0)
    first = workspace.chunk(workspace.rows(1000, 10), like, 10)
    assert first.numel() <= 100
    assert workspace.chunk(workspace.rows(7, 20), like, 20).data_ptr() == first.data_ptr()
    assert workspace.rows(1000, 1000) == 1, "one row at least"


def test_cpu_tensors_take_the_torch_backend():
    assert isinstance(backend_for(torch.device("cpu")), TorchBackend)


def test_kernels_that_cannot_be_launched_are_not_taken_and_the_reason_is_said():
    class WithoutCompiler(TorchBackend):
        def decode(self, W_SD, values_N, bags):
            raise RuntimeError("Failed to find C compiler.\n Please specify via CC environment variable")

    class Wrong(TorchBackend):
        def decode(self, W_SD, values_N, bags):
            return super().decode(W_SD, values_N, bags) + 1

    cpu = torch.device("cpu")
    assert why_not_launched(TorchBackend(), cpu) == ""
    reason = why_not_launched(WithoutCompiler(), cpu)
    assert reason == "Failed to find C compiler. Please specify via CC environment variable."
    assert "wrong" in why_not_launched(Wrong(), cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a first launch works")
def test_without_a_gpu_that_works_the_torch_backend_is_taken_with_a_warning():
    with pytest.warns(UserWarning, match="Triton's do not run here: .+ C compiler"):
        assert isinstance(backend_for(torch.device("cuda")), TorchBackend)


# Triton decides while it is imported whether its kernels are interpreted, and a test above imports it where it came with torch.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton comes with CUDA builds of torch"
)


@needs_triton
@pytest.mark.parametrize("aux_k", [0, 2])
@pytest.mark.parametrize("case", ["random", "fewer than k positive", "all negative", "duplicate rows"])
@pytest.mark.parametrize("architecture", KINDS)
def test_triton_kernels_equal_dense_autograd(architecture, case, aux_k):
    """In Triton's interpreter, which needs no GPU; entries of one latent in pieces of two, so that several latents have more than one."""
    os.environ["TRITON_INTERPRET"] = "1"
    from sarm.nn.triton_backend import TritonBackend

    sae = random_sae(architecture)
    compare(sae, CASES[case](sae, rows()), TritonBackend(piece_entries=2), aux_k)
