"""The screened k largest against float64, also where 16 bits order wrongly, and a step with it against one without."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sarm.nn import screening, sparse
from sarm.nn.screening import Screen
from sarm.settings.sae import SaeSettings
from sarm.training.sae_learner import Learner

D, S, K = 160, 1024, 8


def rows_and_encoder(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, W, b = normal(700, D), normal(S, D), torch.zeros(S)
    if kind == "biases":
        b = 30 * normal(S)
    elif kind == "norms":
        W *= torch.exp(normal(S, 1))
    elif kind == "offset":
        # A common direction in all rows makes every pre-activation large and their differences small.
        x += 3 * torch.ones(D)
        W += 2 * torch.ones(D)
    elif kind == "some rows too close to tell":
        x[100:120] = x[100:120] * 1e-3 + 300 * torch.nn.functional.normalize(normal(D), dim=0)
        W = torch.nn.functional.normalize(W, dim=1)
    elif kind == "tiny":
        W *= 1e-36
    return x, W, b


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["plain", "biases", "norms", "offset", "some rows too close to tell", "tiny"])
def test_the_screened_largest_are_the_largest(kind, seed):
    x, W, b = rows_and_encoder(kind, seed)
    found = Screen().largest(x, W, b, K)
    exact = torch.addmm(b.double(), x.double(), W.double().T)
    wanted = exact.topk(K, dim=1).values
    if found is None:
        assert kind in ("norms", "offset", "tiny")
        return
    values, latents = found
    assert (latents.sort(dim=1).values.diff(dim=1) > 0).all(), "a latent was taken twice"
    # What float32 rounds away in a sum of D products.
    slack = 1e-6 * (x.norm(dim=1, keepdim=True) * W.norm(dim=1).max() + b.abs().max()).double()
    assert ((exact.gather(1, latents) - wanted).abs() <= slack).all()
    assert ((values.double() - wanted).abs() <= slack).all()


def test_latents_that_16_bits_cannot_tell_apart_are_looked_at_exactly():
    x, W, b = rows_and_encoder("plain")
    # A few rows see a hundred copies of one latent that differ by less than bfloat16 can hold.
    W[:100] = W[0] * (1 + 1e-4 * torch.arange(100)[:, None])
    x[:5] = W[0] + 0.1 * x[:5]
    rounded = x.bfloat16() @ W.bfloat16().T
    exact = x.double() @ W.double().T
    order = [set(scores[3].topk(K).indices.tolist()) for scores in (rounded.float(), exact)]
    assert order[0] != order[1], "the test's own premise: 16 bits choose wrongly"
    found = Screen().largest(x, W, b, K)
    assert found is not None
    assert {*found[1][3].tolist()} == order[1]


def test_a_batch_that_cannot_be_screened_is_given_up():
    x, W, b = rows_and_encoder("plain")
    W[:] = W[0] * (1 + 1e-4 * torch.rand(S, 1))
    assert Screen().largest(x, W, b, K) is None


def test_a_row_that_is_not_finite_spoils_no_other():
    x, W, b = rows_and_encoder("plain")
    clean = Screen().largest(x, W, b, K)
    x[7, 3] = torch.nan
    x[9, 5] = torch.inf
    spoilt = Screen().largest(x, W, b, K)
    assert clean is not None
    assert spoilt is not None
    others = [row for row in range(len(x)) if row not in (7, 9)]
    assert torch.equal(clean[1][others], spoilt[1][others])


@pytest.mark.parametrize("aux_k", [0, 32])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_a_step_learns_the_same_with_and_without_the_screen(architecture, aux_k, monkeypatch):
    from sarm.nn.architectures import build_sae

    x = torch.randn(600, D, generator=torch.Generator().manual_seed(1))
    config = SaeSettings(d_sae=S, k=2, aux_k=aux_k, dead_after_rows=600, batch_size=600, architecture=architecture)
    trained = []
    calls = []
    largest = Screen.largest

    def counted(self, *args):
        calls.append(args)
        return largest(self, *args)

    monkeypatch.setattr(Screen, "largest", counted)
    for is_screened in (True, False):
        monkeypatch.setattr(sparse, "is_worth_it", lambda W, k, answer=is_screened: answer)
        sae = build_sae(architecture, D, S, 2)
        sae.initialise_(x, torch.Generator().manual_seed(0))
        learner = Learner(sae, config)
        losses = [float(learner.step(x, 1e-3)) for _ in range(3)]
        trained.append((losses, sae.W_dec.detach().clone(), learner.rows_since_fired.clone()))
    assert len(calls) == 3, "the screen was not asked, or asked where it should not be"
    (losses, W, fired), (plain_losses, plain_W, plain_fired) = trained
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    torch.testing.assert_close(W, plain_W, atol=2e-5, rtol=0)
    assert torch.equal(fired, plain_fired)


def test_the_screen_is_used_where_it_pays(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert screening.is_worth_it(torch.zeros(9216, 576), 27)
    assert not screening.is_worth_it(torch.zeros(9216, 576, dtype=torch.float64), 27)
    assert not screening.is_worth_it(torch.zeros(9216, 576), 900)
    assert not screening.is_worth_it(torch.zeros(9000 + 1, 576), 27)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not screening.is_worth_it(torch.zeros(9216, 576), 27)


@pytest.mark.parametrize(("capability", "answer"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_the_screen_is_used_on_cards_that_multiply_bfloat16(capability, answer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        assert screening.is_worth_it(torch.empty(9216, 576, device="cuda"), 27) == answer


@pytest.mark.parametrize("rows", [64, 700, 4096])
def test_the_screen_gives_the_same_for_any_number_of_rows_at_once(rows, monkeypatch):
    x, W, b = rows_and_encoder("plain")
    wanted = Screen().largest(x, W, b, K)
    monkeypatch.setattr(screening, "_ROWS", {"cpu": rows})
    found = Screen().largest(x, W, b, K)
    assert wanted is not None
    assert found is not None
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)


class Products(TorchDispatchMode):
    """Notes how exact each product that gives pre-activations would be on a GPU, and that others are left as they were."""

    def __init__(self):
        super().__init__()
        self.deciding: list[tuple[bool, bool]] = []
        self.others: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm):
            products = torch.backends.cuda.matmul
            if result.shape[-1] == D:
                self.others.append(products.allow_tf32)
            else:
                self.deciding.append((products.allow_tf32, products.allow_bf16_reduced_precision_reduction))
        return result


@pytest.fixture
def less_exact():
    products = torch.backends.cuda.matmul
    before = products.allow_tf32, products.allow_bf16_reduced_precision_reduction
    products.allow_tf32 = products.allow_bf16_reduced_precision_reduction = True
    yield
    assert products.allow_tf32, "others are as they were"
    products.allow_tf32, products.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize("is_screened", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "batch_topk", "jumprelu", "matching_pursuit"])
def test_products_that_decide_which_latents_are_active_are_not_rounded(
    architecture, is_screened, less_exact, monkeypatch
):
    from sarm.nn.architectures import build_sae

    monkeypatch.setattr(sparse, "is_worth_it", lambda *_: is_screened)
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(1))
    sae = build_sae(architecture, D, S, 2)
    sae.initialise_(x, torch.Generator().manual_seed(0))
    learner = Learner(sae, SaeSettings(d_sae=S, k=2, aux_k=16, dead_after_rows=300, batch_size=300, architecture=architecture))  # fmt: skip
    with Products() as products:
        for _ in range(2):
            learner.step(x, 1e-3)
        with torch.no_grad():
            sae.encode(x)
    assert products.deciding
    assert set(products.deciding) == {(False, False)}
    assert all(products.others)
