import numpy as np
import pytest
import torch
from tests.audit.conftest import WEIGHT, tables

from sarm.audit import causal
from sarm.audit.codes import codes_of
from sarm.data.tokens.sentences import sentence_ends
from sarm.evaluate.statistics import pair_credit
from sarm.nn.sae import dense, standardise
from sarm.nn.topk import TopKSae

D, S, K = 8, 32, 4


class Model(torch.nn.Module):
    """The part of a SARM behind the backbone."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.sae = TopKSae(D, S, K)
        with torch.no_grad():
            self.sae.W_dec.copy_(torch.randn(S, D, generator=generator))
            self.sae.normalise_decoder_()
            self.sae.W_enc.copy_(self.sae.W_dec.T)
        self.weight = torch.randn(S, generator=generator)

    def score(self, codes):
        return (dense(codes, S) * self.weight).sum(1, keepdim=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def real(model):
    """Codes that a real encoder made of random residuals; each pair is a prompt."""
    from dataclasses import replace

    from scipy import sparse

    h = torch.randn(60, D, generator=torch.Generator().manual_seed(1))
    z = dense(model.sae(standardise(h)), S).detach().numpy().astype(np.float64)
    base = codes_of(*tables(6), WEIGHT)
    num = 30
    names = np.array([f"p{i}" for i in range(num)])
    return replace(
        base,
        weight=model.weight.numpy().astype(np.float64),
        reward=z @ model.weight.numpy().astype(np.float64),
        z=sparse.csr_array(z),
        residual=h.numpy(),
        tokens=np.ones(60),
        pair_ids=names,
        prompts=names,
        roles=np.array(["target"] * num),
        subsets=np.array(["a"] * num),
        ends=np.ones(60, dtype=np.int64),
        required=np.zeros(num),
        chosen=np.arange(num),
        rejected=np.arange(num, 60),
    )


def test_removing_a_direction_before_topk_lets_competitors_in(model, real):
    latents = np.array([3, 4, 5, 6])
    z = torch.from_numpy(real.z[:, latents].toarray()).float()
    after = causal.upstream_rewards(model, torch.from_numpy(real.residual), z, latents, -1.0)
    silent = (z == 0).all(1).numpy()
    np.testing.assert_allclose(after[silent], real.reward[silent], atol=1e-5)
    linear = real.reward - real.z[:, latents] @ real.weight[latents]
    assert np.abs(after - linear)[~silent].mean() > 0.01, "the head alone is not the whole story"
    x = standardise(torch.from_numpy(real.residual))
    brute = (
        model.score(model.sae(standardise(x - z @ model.sae.W_dec[torch.from_numpy(latents)]))).detach().numpy()[:, 0]
    )
    np.testing.assert_allclose(after, brute, atol=1e-4)


def test_a_direction_is_removed_in_the_units_of_what_the_sae_takes():
    """Of an SAE that takes activations as they are, in those of the activation."""
    model = Model()
    model.sae.standardises = False
    h = 3 * torch.randn(40, D, generator=torch.Generator().manual_seed(5)) + 2
    latents = np.array([3, 4, 5, 6])
    z = dense(model.sae(h), S)[:, latents].detach()
    for sign in (-1.0, 1.0):
        found = causal.upstream_rewards(model, h, z, latents, sign)
        brute = model.score(model.sae(h + sign * z @ model.sae.W_dec[torch.from_numpy(latents)]))
        np.testing.assert_allclose(found, brute.detach().numpy()[:, 0], rtol=1e-5, atol=1e-5)


def test_upstream_reports_the_realised_share_beside_controls(model, real):
    found = causal.upstream(model, real, np.array([1, 2]), np.array([[7, 8], [9, 10], [11, 12]]))
    for name, sign in (("removed", -1), ("added", 1)):
        one = getattr(found, name)
        assert one.realised_ci95[0] <= one.change.value <= one.realised_ci95[1]
        expected = sign * (real.difference[:, [1, 2]] @ real.weight[[1, 2]]).mean()
        assert one.linear == pytest.approx(expected)
        assert one.realised_share == pytest.approx(one.change.value / expected)


def test_a_swap_is_scoring_with_the_values_changed_over(real):
    latents = np.array([1, 2, 3])
    z = real.z.toarray()
    chosen, rejected = z[real.chosen].copy(), z[real.rejected].copy()
    chosen[:, latents], rejected[:, latents] = z[real.rejected][:, latents], z[real.chosen][:, latents]
    brute = (chosen - rejected) @ real.weight
    found = causal.swap(real, latents, np.array([[7, 8, 9]] * 3))
    assert found.change.value == pytest.approx((brute - real.margins).mean())
    assert found.flips == pytest.approx((np.sign(brute) != np.sign(real.margins)).mean())


def test_deleting_in_order_loses_the_margin_sooner_than_at_random(codes):
    target, rng = codes.role("target"), np.random.default_rng(0)
    order = causal.contribution_order(codes.role("select"))
    assert order[:2].tolist() == [2, 1]
    found = causal.deletion_curves(target, order, [rng.permutation(order) for _ in range(50)], (1, 2, 32))
    own = found.ordered
    assert own.margin_share[-1] == pytest.approx(1.0)
    kept = target.difference[:, [2]] @ target.weight[[2]]
    assert own.margin_share[0] == pytest.approx(kept.mean() / target.margins.mean())
    assert own.accuracy_only[0] == pytest.approx(pair_credit(kept).mean())
    assert own.accuracy_without[0] == pytest.approx(pair_credit(target.margins - kept).mean())
    assert own.accuracy_only[-1] == found.accuracy == pytest.approx(pair_credit(target.margins).mean())
    assert found.aopc.value > 1.3 * found.aopc.control_median


def test_sentences_are_cut_where_the_features_fire_and_elsewhere():
    text = "One is here. Two is there! Three is last."
    edits = causal.sentence_edits(
        [text, "Only one.", text, text], [[0.0, 2.0, 1.0], [1.0], [1.0, 1.0, 1.0], [1.0, 0.0]], sentence_ends, np.random.default_rng(0)
    )  # fmt: skip
    assert edits[1:] == [None, None, None]
    assert edits[0] is not None
    own, placebo = edits[0]
    assert own == "One is here. Three is last."
    assert placebo in ("Two is there! Three is last.", "One is here. Two is there!")
    effect = causal.deletion_effect(np.array([[-2.0, -0.5], [-1.0, 0.5]]), ["a", "b"])
    assert effect.own_sentence.value == -1.5
    assert effect.difference.value == -1.5
    low, high = effect.placebo.ci95
    assert low == -high < -0.5, "two prompts say little"
