"""SparseRM: directions by contrast, projections and head against float64 and a general solver; leakage, and planted preferences."""

import numpy as np
import pytest
from scipy import optimize, sparse

from sarm.evaluate import sparse_rm
from sarm.evaluate.sparse_rm import contrast_order, fit_sparse_rm
from sarm.settings.checks import UserError

D_IN, D_SAE, NUM = 64, 40, 240
RELEVANT = (5, 11, 30)


def made(num: int = NUM, seed: int = 0, strength: float = 3.0):
    """Responses that are sums of a few directions; the preferred one has more of latents 5 and 11 and less of 30."""
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(D_SAE, D_IN))
    z = rng.random((2, num, D_SAE)) * (rng.random((2, num, D_SAE)) < 0.25)
    margin = (z[0] - z[1])[:, list(RELEVANT)] @ np.array([1.0, 1.0, -1.0]) * strength
    flip = rng.random(num) > 1 / (1 + np.exp(-margin))
    z[:, flip] = z[::-1, flip]
    x = z @ W_dec + 0.1 * rng.normal(size=(2, num, D_IN))
    return x[0], x[1], sparse.csr_array(z[0] - z[1]), W_dec, np.arange(num) // 4


def test_the_planted_directions_come_first_and_predict_unseen_pairs():
    found = fit_sparse_rm(*made(), seed=0)
    assert set(found.latents[:4].tolist()) >= set(RELEVANT)
    order = contrast_order(made()[2]).tolist()
    assert sorted(order[:2]) != sorted(RELEVANT[:2]), "sides take turns"
    assert {order[0], order[2]} == {5, 11}
    assert order[1] == 30
    rng = np.random.default_rng(3)
    z = rng.random((2, 400, D_SAE)) * (rng.random((2, 400, D_SAE)) < 0.25)
    margin = (z[0] - z[1])[:, list(RELEVANT)] @ np.array([1.0, 1.0, -1.0])
    unseen = z @ made()[3]
    kept = np.abs(margin) > 0.2
    right = (found.rewards(unseen[0]) - found.rewards(unseen[1]))[kept] * margin[kept] > 0
    assert right.mean() > 0.85


def test_t_is_that_of_a_paired_test():
    from scipy import stats

    difference = made()[2]
    dense = difference.toarray()
    t = stats.ttest_1samp(dense, 0).statistic
    order = contrast_order(difference)
    raising = order[t[order] > 0]
    assert (np.diff(t[raising]) <= 1e-9).all()
    lowering = order[t[order] < 0]
    assert (np.diff(t[lowering]) >= -1e-9).all()
    assert set(order) == set(np.flatnonzero(dense.mean(0)))


def test_the_head_is_the_minimum_of_its_loss_on_the_projections():
    chosen, rejected, difference, W_dec, prompts = made()
    found = fit_sparse_rm(chosen, rejected, difference, W_dec, prompts, seed=0, counts=(6,))
    unit = W_dec[found.latents] / np.linalg.norm(W_dec[found.latents], axis=1, keepdims=True)
    scale = np.concatenate([chosen @ unit.T, rejected @ unit.T]).std(axis=0)
    p = (chosen - rejected) @ unit.T / scale

    def loss(w):
        m = p @ w
        return found.C * np.logaddexp(0, -m).sum() + w @ w / 2, -found.C * p.T @ (1 / (1 + np.exp(m))) + w

    best = optimize.minimize(loss, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-10})
    np.testing.assert_allclose(found.head, best.x / scale, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found.weight, (best.x / scale) @ unit, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(found.rewards(chosen), chosen @ found.weight, rtol=1e-5, atol=1e-5)


def test_directions_of_a_fold_are_chosen_without_its_pairs(monkeypatch):
    """Of pure noise, directions that had seen the fold would seem to predict it."""
    rng = np.random.default_rng(5)
    num = 80
    W_dec = rng.normal(size=(400, D_IN))
    z = rng.random((2, num, 400)) * (rng.random((2, num, 400)) < 0.2)
    x = z @ W_dec
    seen: list[int] = []
    known = sparse_rm.contrast_order
    monkeypatch.setattr(sparse_rm, "contrast_order", lambda d: seen.append(d.shape[0]) or known(d))
    found = fit_sparse_rm(x[0], x[1], sparse.csr_array(z[0] - z[1]), W_dec, np.arange(num), seed=0)
    assert seen == [64] * 5 + [80]
    assert min(found.cv_nll.values()) > np.log(2) - 0.02


def test_one_who_has_more_directions_than_latents_that_differ_takes_those():
    chosen, rejected, difference, W_dec, prompts = made()
    few = sparse.csr_array(difference.multiply(np.isin(np.arange(D_SAE), [5, 30])[None]))
    assert sorted(fit_sparse_rm(chosen, rejected, few, W_dec, prompts, seed=0).latents.tolist()) == [5, 30]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {**a, "prompt_ids_N": np.zeros(NUM)}, "at least 3 prompts, got 1"),
        (lambda a: {**a, "chosen_ND": a["chosen_ND"] * np.nan}, "not finite"),
        (lambda a: {**a, "difference_NS": sparse.csr_array((NUM, D_SAE))}, "no latent of the dictionary tells"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, said):
    names = ("chosen_ND", "rejected_ND", "difference_NS", "W_dec_SD", "prompt_ids_N")
    with pytest.raises(UserError, match=said):
        fit_sparse_rm(**change(dict(zip(names, made(), strict=True))), seed=0)
