"""The head that relabelling retrains on cached codes, beside the objective of full training and against clean labels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse

from sarm.audit.codes import AuditCodes
from sarm.audit.relabelling import flipped
from sarm.audit.retraining import CachedHead, cross_fitted, root_mean_square
from sarm.training.objective import Objective


@pytest.fixture
def codes() -> AuditCodes:
    """40 prompts of three pairs, with margins, and twelve latents of very different scales and means."""
    rng = np.random.default_rng(0)
    num, width = 120, 12
    z = np.abs(rng.normal(size=(2 * num, width))) * 10.0 ** rng.integers(-2, 3, width)
    z[:num] *= 1 + rng.random(width)
    prompts = np.repeat([f"p{i}" for i in range(40)], 3)
    roles = np.where(np.arange(num) < 90, "select", "off_target")
    matrix = sparse.csr_array(z)
    return AuditCodes(
        weight=np.zeros(width), reward=np.zeros(2 * num), tokens=np.ones(2 * num), z=matrix, sentence=matrix, ends=np.ones(2 * num, int),
        residual=np.zeros((2 * num, 1), np.float32), pair_ids=np.arange(num).astype(str), prompts=prompts, roles=roles,
        subsets=np.full(num, "a"), chosen=np.arange(num), rejected=np.arange(num, 2 * num), required=rng.uniform(0, 2, num),
    )  # fmt: skip


def head_of(codes: AuditCodes, **objective) -> CachedHead:
    return CachedHead(codes, {}, 0, **{"use_margin": True, "label_smoothing": 0.0, **objective})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("use_margin", [True, False])
def test_the_cached_head_minimises_the_objective_of_full_training(codes, use_margin, smoothing):
    train = codes.role("train")
    head = head_of(codes, use_margin=use_margin, label_smoothing=smoothing)
    sign = np.where(np.arange(train.num_pairs) % 5 == 0, -1.0, 1.0)
    rows = np.arange(train.num_pairs)
    weight = torch.tensor(head.fit(rows, sign).astype(np.float64), requires_grad=True)
    # The same pairs with their labels flipped, as training reads them: rewards of both sides, and their margins.
    turned = flipped(train, sign < 0)
    z = torch.from_numpy(turned.z.toarray()[:, head.alive] / head.scale)
    rewards = SimpleNamespace(logits=(z @ weight)[:, None])
    margins = turned.required.tolist()
    losses = Objective(smoothing, use_margin)(rewards, turned.chosen.tolist(), turned.rejected.tolist(), margins)
    (head.penalty * losses.sum() + weight.square().sum() / 2).backward()
    size = head.penalty * np.abs(head.x).sum(0).max()
    assert weight.grad.abs().max().item() < 2e-3 * size, "the gradient of the training's objective vanishes at the head"


def test_the_penalty_is_chosen_on_the_scale_that_it_is_used_on(codes):
    head = head_of(codes)
    np.testing.assert_allclose(root_mean_square(head.x), 1.0, rtol=1e-5)
    train = codes.role("train")
    everything = np.arange(train.num_pairs), np.ones(train.num_pairs)
    assert head.penalty == head.penalty_for(*everything)
    # Turning every label around is the same problem: neither scale nor penalty may notice which side was called chosen.
    other = head_of(flipped(codes, np.ones(codes.num_pairs, bool)))
    np.testing.assert_allclose(other.scale, head.scale)
    assert other.penalty == head.penalty
    np.testing.assert_allclose(head.fit(everything[0], -everything[1]), other.fit(*everything), atol=1e-5)


def test_nothing_of_the_noise_study_knows_a_clean_label(codes):
    train = codes.role("train")
    rng = np.random.default_rng(1)
    rows = np.flatnonzero(np.isin(train.prompts, np.unique(train.prompts)[:20]))
    sign = np.ones(train.num_pairs)
    sign[rng.choice(rows, len(rows) // 4, replace=False)] = -1.0
    # The same noisy data, told with the noise as its labels: what a study of them alone could see.
    told, plain = head_of(flipped(codes, _of_all(codes, train, sign))), np.ones(train.num_pairs)
    head = head_of(codes)
    penalty = head.penalty_for(rows, sign)
    assert penalty == told.penalty_for(rows, plain)
    np.testing.assert_allclose(head.fit(rows, sign, penalty), told.fit(rows, plain, penalty), atol=1e-5)
    margins = head.cross_fitted(rows, sign, penalty)
    np.testing.assert_allclose(margins, told.cross_fitted(rows, plain, penalty), atol=1e-4)
    # Clean labels of the pairs that are left out change nothing.
    left_out = np.setdiff1d(np.arange(train.num_pairs), rows)
    others = sign.copy()
    others[left_out] = -1.0
    np.testing.assert_array_equal(head.cross_fitted(rows, others, penalty), margins)
    x = rng.normal(2.0, 1.0, (train.num_pairs, 4))
    np.testing.assert_allclose(
        cross_fitted(x, train.prompts, sign, 0), cross_fitted(x * sign[:, None], train.prompts, plain, 0), atol=1e-6
    )


def _of_all(codes: AuditCodes, train: AuditCodes, sign: np.ndarray) -> np.ndarray:
    return np.isin(codes.pair_ids, train.pair_ids[sign < 0])


def test_flipping_twice_is_the_identity_on_codes_and_margins_stay(codes):
    some = np.arange(codes.num_pairs) % 3 == 0
    once = flipped(codes, some)
    assert (once.required == codes.required).all()
    assert (once.chosen[some] == codes.rejected[some]).all()
    twice = flipped(once, some)
    assert (twice.chosen == codes.chosen).all()
    assert (twice.rejected == codes.rejected).all()
    assert (twice.required == codes.required).all()
