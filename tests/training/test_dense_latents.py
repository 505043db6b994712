"""The penalty on dense latents and the proximal step of the head: against formulas, and doing what they are for."""

import json
from types import SimpleNamespace

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sarm.nn.architectures import build_sae
from sarm.nn.losses import bradley_terry
from sarm.settings.reward import RewardSettings
from sarm.training.dense_latents import RecentFiring
from sarm.training.objective import Objective
from sarm.training.reward import parameter_groups
from sarm.training.sparse_adamw import adamw

D_SAE, K = 12, 3
CPU = torch.device("cpu")


def codes(num: int, seed: int, always: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes; `always` is a latent that fires on each."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.stack([torch.randperm(D_SAE - 1, generator=generator)[:K] + 1 for _ in range(num)])
    if always is not None:
        latents[:, 0] = always
    return torch.rand(num, K, generator=generator) + 0.1, latents


def seen(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> RecentFiring:
    firing = RecentFiring(D_SAE)
    for values, latents in parts:
        firing.see(values, latents)
        firing.end_step(CPU)
    return firing


def test_the_penalty_is_the_formula():
    parts = [codes(40, seed, always=0) for seed in range(5)]
    firing = seen(parts)
    fired, weight = torch.zeros(D_SAE, dtype=torch.float64), 0.0
    for values, latents in parts:
        fade = 0.5 ** (40 / 512)
        step = torch.zeros(D_SAE, dtype=torch.float64)
        for row_values, row_latents in zip(values, latents, strict=True):
            for value, latent in zip(row_values, row_latents, strict=True):
                step[latent] += float(value != 0)
        fired, weight = fade * fired + step, fade * weight + 40
    excess = [max(0.0, 2 * float(f) / weight - 1) for f in fired]
    assert excess[0] == pytest.approx(1.0)
    values, latents = codes(7, 9, always=0)
    wanted = [
        sum(excess[i] * float(v) for v, i in zip(row, ids, strict=True)) / float(row.sum())
        for row, ids in zip(values, latents.tolist(), strict=True)
    ]
    torch.testing.assert_close(firing.penalty(values, latents), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_few_responses_or_latents_that_fire_rarely_are_not_penalised():
    values, latents = codes(50, 0, always=0)
    assert float(seen([(values, latents)]).penalty(values, latents).sum()) == 0
    rare = [codes(100, seed) for seed in range(4)]
    assert float(seen(rare).penalty(*rare[0]).sum()) == 0


def test_what_fired_long_ago_fades():
    firing = seen([*[codes(200, seed, always=0) for seed in range(5)], *[codes(200, 10 + seed) for seed in range(20)]])
    assert float(firing.excess()[0]) == 0


def test_gradients_flow_to_the_values_of_dense_latents_and_a_state_goes_on():
    firing = seen([codes(100, seed, always=0) for seed in range(4)])
    values, latents = codes(6, 20, always=0)
    values.requires_grad_(True)
    firing.penalty(values, latents).sum().backward()
    assert values.grad is not None
    assert (values.grad[:, 0] > 0).all()
    assert (values.grad[:, 1:] < 0).all()
    again = RecentFiring(D_SAE)
    again.load(json.loads(json.dumps(firing.state())))
    again.see(*codes(30, 21))
    firing.see(*codes(30, 21))
    for one in (again, firing):
        one.end_step(CPU)
    assert torch.equal(again.excess(), firing.excess())


def test_the_objective_adds_it_to_each_pair():
    firing = seen([codes(100, seed, always=0) for seed in range(4)])
    values, latents = codes(4, 30, always=0)
    output = SimpleNamespace(logits=torch.randn(4, 1), latent_values=values, latent_indices=latents)
    dense = firing.penalty(values, latents)
    plain = bradley_terry(output.logits[[0, 1], 0] - output.logits[[2, 3], 0])
    found = Objective(dense_weight=0.3)(output, [0, 1], [2, 3], [None, None], firing)
    torch.testing.assert_close(found, plain + 0.3 * (dense[[0, 1]] + dense[[2, 3]]) / 2)
    assert torch.equal(Objective(dense_weight=0.3)(output, [0, 1], [2, 3], [None, None]), plain)


def test_the_proximal_step_is_soft_thresholding_in_adam_s_metric():
    plain, sparse = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    group = {"lr": 0.01, "weight_decay": 0.0}
    optimizers = (
        torch.optim.AdamW([{"params": [plain], **group}]),
        adamw([{"params": [sparse], **group, "l1": 3.0}]),
    )
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(9)
    for step in range(1, 5):
        gradient = torch.randn(9, generator=generator)
        squares = 0.999 * squares + 0.001 * gradient.square()
        plain.data.copy_(sparse.data)
        for optimizer, weight in zip(optimizers, (plain, sparse), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
        threshold = 0.01 * 3.0 / ((squares / (1 - 0.999**step)).sqrt() + 1e-8)
        wanted = plain.sign() * (plain.abs() - threshold).clamp_min(0)
        torch.testing.assert_close(sparse, wanted, rtol=1e-5, atol=1e-6)
    assert (sparse == 0).any()


def test_it_ends_where_the_penalised_loss_has_its_minimum():
    """Against scikit-learn's solver of the same problem."""
    generator = torch.Generator().manual_seed(3)
    z = torch.rand(400, 30, generator=generator)
    truth = torch.zeros(30)
    truth[[2, 11]] = torch.tensor([4.0, -3.0])
    noise = torch.randn(200, generator=generator)
    difference = z[:200] - z[200:]
    chosen = (difference @ truth + noise).sign()
    l1 = 0.02
    head = torch.nn.Parameter(torch.zeros(30))
    optimizer = adamw([{"params": [head], "lr": 0.05, "weight_decay": 0.0, "l1": l1}])
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 3000)
        bradley_terry((difference @ head) * chosen).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    solver = LogisticRegression(
        C=1 / (200 * l1), l1_ratio=1.0, solver="liblinear", fit_intercept=False, tol=1e-8, max_iter=5000
    )
    wanted = torch.from_numpy(solver.fit(difference.numpy(), chosen.numpy()).coef_[0]).float()
    assert {2, 11} <= set(wanted.nonzero().flatten().tolist())
    assert head.detach().nonzero().flatten().tolist() == wanted.nonzero().flatten().tolist()
    torch.testing.assert_close(head.detach(), wanted, rtol=0.01, atol=0.01)


def test_only_a_head_over_latents_is_made_sparse():
    config = RewardSettings(head_l1=0.5)
    model = torch.nn.Module()
    model.score = torch.nn.Linear(4, 1, bias=False)
    assert not any("l1" in group for group in parameter_groups(model, config))
    model.sae = build_sae(d_in=4, d_sae=8, k=2, architecture="topk")
    groups = parameter_groups(model, config)
    assert [group["l1"] for group in groups if "l1" in group] == [0.5]
