"""Features by strength and stability, control sets, and what an edit repairs: against numbers counted by hand and planted truths."""

import numpy as np
import pytest
from scipy import sparse

from sarm.audit.repair import LEVELS, Rewards, Tried, choose, repair, tried
from sarm.audit.style_features import control_sets, style_features
from sarm.evaluate.intervals import difference_interval, mean_interval, share_interval
from sarm.settings.checks import UserError

# c0, c1, r0, r1: right everywhere; flipped by the property; wrong everywhere; wrong when clean, right when hard.
BEFORE = np.array([[3, 4, 1, 2], [3, 6, 1, 4], [1, 2, 3, 4], [1, 5, 3, 0]], float)
AFTER = np.array([[3, 4, 1, 2], [3, 4, 1, 2], [1, 2, 3, 4], [1, 5, 3, 2]], float)
PROMPTS = np.array(["a", "a", "b", "c"])


def test_levels_are_those_counted_by_hand():
    rewards = Rewards(BEFORE, PROMPTS)
    assert rewards.level("hard").tolist() == [1, 0, 0, 1]
    assert rewards.level("normal").tolist() == [1, 1, 0, 0.5]
    assert rewards.level("easy").tolist() == [1, 1, 0, 1]
    assert rewards.level("clean").tolist() == [1, 1, 0, 0]
    assert rewards.flipped().tolist() == [False, True, False, False]


def test_ties_are_never_right():
    assert [float(Rewards(np.ones((1, 4)), np.array(["a"])).level(name)[0]) for name in LEVELS] == [0, 0, 0, 0]


def test_the_repaired_share_is_gain_over_loss_with_the_interval_of_its_linearisation():
    clean = np.tile(BEFORE[:3], (10, 1))
    after = clean.copy()
    after[1::6] = AFTER[1]
    prompts = np.array([f"p{i // 2}" for i in range(30)])
    found = repair(Rewards(clean, prompts), Rewards(after, prompts))
    flipped = np.arange(30) % 3 == 1
    gained = np.arange(30) % 6 == 1
    assert found.lost == pytest.approx(1 / 3)
    assert found.lost_ci95 == pytest.approx(difference_interval(1.0 * flipped, prompts))
    assert found.repaired.value == pytest.approx(0.5)
    assert (found.flips, found.flips_repaired.value) == (10, 0.5)
    assert found.flips_repaired.ci95 == pytest.approx(share_interval(np.array([0.0, 1.0] * 5), prompts[flipped]))
    values = 0.5 + (gained - 0.5 * flipped) / flipped.mean()
    assert found.repaired.ci95 == pytest.approx(mean_interval(values, prompts))
    assert found.change["hard"].value == pytest.approx(gained.mean())
    assert found.change["hard"].ci95 == pytest.approx(difference_interval(1.0 * gained, prompts))
    assert found.before["hard"].ci95 == pytest.approx(share_interval(1.0 * (np.arange(30) % 3 == 0), prompts))
    assert (found.num_pairs, found.num_prompts) == (30, 15)


def test_a_repair_of_everything_is_as_uncertain_as_the_gain_itself():
    lost = Rewards(np.tile(BEFORE[1], (30, 1)), np.array([f"p{i}" for i in range(30)]))
    back = lost._replace(rewards=np.tile(AFTER[1], (30, 1)))
    found = repair(lost, back)
    assert found.repaired.value == 1
    assert found.repaired.ci95 == pytest.approx(difference_interval(np.ones(30), lost.prompts))
    assert found.repaired.ci95.low < 0.95


def test_a_property_that_costs_nothing_has_nothing_to_repair():
    rewards = Rewards(BEFORE[:1], PROMPTS[:1])
    found = repair(rewards, rewards)
    assert found.repaired is None
    assert found.flips_repaired is None


def dose(features: int, share: float, hard: float, normal: float = 0.8, easy: float = 0.9) -> Tried:
    return Tried(features, share, {"hard": hard, "normal": normal, "easy": easy, "clean": 0.8})


def test_the_chosen_dose_gains_most_within_the_cost_and_is_the_smallest_of_equals():
    plain = dose(0, 1.0, 0.2)
    doses = [dose(1, 1.0, 0.5), dose(4, 1.0, 0.7), dose(4, 0.5, 0.7), dose(8, 1.0, 0.9, normal=0.78), dose(16, 1.0, 0.9, easy=0.5)]  # fmt: skip
    assert choose(plain, doses, 0.01) == doses[2]
    assert choose(plain, doses, 0.02) == doses[3]
    assert choose(plain, doses, 0.01, ("clean",)) == doses[3]
    assert choose(plain, doses, 0.01, ("clean", "normal")) == doses[4]
    assert choose(plain, [dose(1, 1.0, 0.2), dose(2, 1.0, 0.1)], 0.5) is None
    assert tried(3, 0.5, Rewards(BEFORE, PROMPTS)).accuracy == {"hard": 0.5, "normal": 0.625, "easy": 0.75, "clean": 0.5}  # fmt: skip


def planted_codes(rng: np.random.Generator, prompts: np.ndarray, num_latents: int):
    """Latents 0 and 1 carry the property, 1 in 60 % of prompts alone; 2 falls with it; the others do not know of it."""
    plain = rng.random((len(prompts), num_latents)) * (rng.random((len(prompts), num_latents)) < 0.5)
    styled = plain.copy()
    names = np.unique(prompts)
    styled[:, 0] += 1.0
    styled[np.isin(prompts, names[: int(0.6 * len(names))]), 1] += 3.0
    styled[:, 2] = plain[:, 2] - 0.3
    return sparse.csr_array(plain), sparse.csr_array(styled), sparse.csr_array((np.vstack([plain, styled]) != 0) * 0.25)


def test_features_come_by_strength_and_have_to_be_stable_over_prompts():
    rng = np.random.default_rng(0)
    prompts = np.array([f"p{i % 20:02d}" for i in range(60)])
    plain, styled, shares = planted_codes(rng, prompts, 12)
    norms = np.linspace(1, 2, 12)
    found = style_features(plain_TS=plain, styled_TS=styled, shares_TS=shares, prompts_T=prompts, norm_S=norms, min_stability=0.5)  # fmt: skip
    assert found.latent.tolist() == [1, 0]
    assert found.strength == pytest.approx([3.0 * 0.6 * norms[1], norms[0]])
    assert found.stability == pytest.approx([0.6, 1.0])
    strict = style_features(plain_TS=plain, styled_TS=styled, shares_TS=shares, prompts_T=prompts, norm_S=norms, min_stability=0.7)  # fmt: skip
    assert strict.latent.tolist() == [0]
    dense = shares.toarray()
    assert found.density == pytest.approx(dense.mean(0))
    values = np.vstack([plain.toarray(), styled.toarray()]).mean(0)
    assert found.size == pytest.approx(np.abs(values / dense.mean(0)) * norms)


def test_prompts_with_many_pairs_weigh_as_one():
    prompts = np.array(["many"] * 9 + ["one"])
    plain = np.zeros((10, 1))
    styled = np.array([[0.0]] * 9 + [[2.0]])
    found = style_features(plain_TS=sparse.csr_array(plain), styled_TS=sparse.csr_array(styled), shares_TS=sparse.csr_array(np.ones((20, 1))), prompts_T=prompts, norm_S=np.ones(1), min_stability=0.5)  # fmt: skip
    assert found.strength == pytest.approx([1.0])
    assert found.num_prompts == 2


def test_controls_share_no_latent_with_the_candidates_and_need_room():
    rng = np.random.default_rng(1)
    prompts = np.array([f"p{i}" for i in range(30)])
    plain, styled, shares = planted_codes(rng, prompts, 40)
    found = style_features(plain_TS=plain, styled_TS=styled, shares_TS=shares, prompts_T=prompts, norm_S=np.ones(40), min_stability=0.5)  # fmt: skip
    known = {"density_S": found.density, "size_S": found.size, "candidates": found.latent, "count": 6, "seed": 0}
    sets = control_sets(chosen=found.latent[:1], **known)
    assert {kind: own.shape for kind, own in sets.items()} == {"random": (6, 1), "matched": (6, 1)}
    for own in sets.values():
        assert not set(own.ravel().tolist()) & set(found.latent.tolist())
    assert len(set(sets["random"].ravel().tolist())) > 1
    with pytest.raises(UserError, match="others fire to compare them with"):
        control_sets(chosen=np.arange(30), **known)
