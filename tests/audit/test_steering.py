import json

import numpy as np
import pytest
from scipy import optimize, sparse

from sarm.audit.codes import AuditCodes
from sarm.audit.goals import certificate, edit_for, mean_difference
from sarm.audit.steering import (
    Edit,
    Sweep,
    against_controls,
    make_edit,
    measure_edit,
    ratio_interval,
    specificity,
    steered_rewards,
)
from sarm.contracts.figures import plain_values
from sarm.contracts.manifest import finite_or_null
from sarm.contracts.untrusted import parse_json
from sarm.evaluate.statistics import pair_credit
from sarm.report.audit_sections import steering_sections
from sarm.settings.checks import UserError

LATENTS = np.array([1, 2])


@pytest.mark.parametrize(
    ("kind", "strength", "after"),
    [("scale", 3.0, [3.0, -6.0]), ("add", 0.5, [1.5, -1.5]), ("zero", 9.0, [0.0, 0.0]), ("set", -1.0, [-1.0, -1.0])],
)
def test_closed_form_equals_scoring_again_with_the_edited_head(codes, kind, strength, after):
    edit = make_edit(kind, strength, LATENTS, codes.weight)
    np.testing.assert_allclose(edit.after, after)
    rerun = codes.z @ edit.applied(codes.weight)
    np.testing.assert_allclose(steered_rewards(codes, edit), rerun, atol=1e-5)


def test_an_edit_is_undone_to_the_bit_and_refuses_another_head():
    weight = np.random.default_rng(0).normal(size=6).astype(np.float32)
    edit = Edit.from_json(make_edit("scale", 1.7, LATENTS, weight).as_json())
    edited = edit.applied(weight)
    assert (edited != weight).sum() == 2
    assert edit.undone().applied(edited).tobytes() == weight.tobytes()
    with pytest.raises(UserError, match="not those that this edit was made for"):
        edit.applied(edited)
    with pytest.raises(UserError, match="unknown edit double"):
        make_edit("double", 1.0, LATENTS, weight)


@pytest.mark.parametrize("kind", ["scale", "add", "zero", "set"])
def test_a_sweep_agrees_with_one_edit_at_a_time(codes, kind):
    target = codes.role("target")
    sets = np.array([[1, 2], [0, 4], [3, 1]])
    strengths = (-1.0, 0.0, 2.5)
    found = Sweep(target, kind, strengths, sets).summary()
    for a, strength in enumerate(strengths):
        for g, latents in enumerate(sets):
            after = steered_rewards(target, make_edit(kind, strength, latents, target.weight))
            margins = after[target.chosen] - after[target.rejected]
            moved = (after - target.reward)[target.responses]
            assert found["margin"][a, g] == pytest.approx((margins - target.margins).mean(), abs=1e-5)
            assert found["chosen"][a, g] == pytest.approx((after - target.reward)[target.chosen].mean(), abs=1e-5)
            assert found["affected"][a, g] == pytest.approx((np.abs(moved) > 1e-9).mean())
            assert found["flips"][a, g] == pytest.approx((np.sign(margins) != np.sign(target.margins)).mean())
            assert found["accuracy"][a, g] == pytest.approx(pair_credit(margins).mean())


def test_an_edit_of_the_features_moves_the_target_and_nothing_else(codes):
    target, off = codes.role("target"), codes.role("off_target")
    after = steered_rewards(codes, make_edit("scale", 2.0, LATENTS, codes.weight))
    on_target, on_off = (measure_edit(part, after) for part in (target, off))
    low, high = on_target.margin_shift.ci95
    assert 0 < low < on_target.margin_shift.value < high
    assert on_off.margin_shift.value == 0
    assert on_off.num_prompts < 20
    assert np.isnan(on_off.margin_shift.ci95).all(), "that so few prompts do not move bounds no other"
    assert on_target.affected.value == 1.0
    assert on_off.affected.value == 0.0
    assert on_target.accuracy_change.value == pytest.approx(
        on_target.accuracy_after.value - on_target.accuracy_before.value
    )
    assert specificity(on_target.margin_shift.value, [on_off.margin_shift.value]) == 1.0
    assert specificity(-0.2, [0.1, -0.2]) == 0.5
    assert specificity(0.0, [0.0]) is None


def test_an_effect_beside_its_controls():
    found = against_controls(-3.0, np.array([1.0, -1.0, 0.5, 2.0]))
    assert found.control_median == 1.0
    assert found.ratio == 3.0
    assert found.p == pytest.approx(1 / 5)
    assert against_controls(1.0, np.zeros(3)).ratio == float("inf")
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(30), 2)
    per_pair = np.column_stack([rng.normal(3, 1, 60), rng.normal(1, 0.1, (60, 5))])
    low, high = ratio_interval(per_pair, prompts)
    assert 2 < low < 3 < high < 4


def test_a_goal_is_reached_by_a_sparse_edit_that_holds_the_rest(codes):
    target = codes.role("target")
    edit = edit_for(target, {"off": codes.role("off_select")}, 0.75, 1e-6, 5.0)
    after = codes.z @ (codes.weight + edit.delta)
    shift = (after[target.chosen] - after[target.rejected] - target.margins).mean()
    assert shift == pytest.approx(0.75, abs=1e-6) == edit.target_shift
    assert edit.largest_other_shift <= 1e-6 + 1e-9
    assert 1 <= np.count_nonzero(edit.delta) <= 3
    assert np.abs(edit.delta).sum() <= 0.75 / np.abs(mean_difference(target)).max() * 1.5


def test_a_goal_out_of_reach_says_how_far_one_can_get(codes):
    target = codes.role("target")
    with pytest.raises(UserError, match=r"goal of 5 cannot be reached.*rise by (\d|\.)+ at most") as error:
        edit_for(target, {"off": codes.role("off_select")}, 5.0, 0.1, 0.5)
    furthest = float(str(error.value).split("rise by ")[1].split(" ")[0])
    assert edit_for(target, {"off": codes.role("off_select")}, 0.999 * furthest, 0.1, 0.5).target_shift <= furthest
    with pytest.raises(UserError, match=r"rise by 0\.1 at most"):
        edit_for(target, {"itself": target}, 1.0, 0.1, 5.0)


def group_of(differences: np.ndarray, prompts: list[str] | None = None) -> AuditCodes:
    """Pairs whose latents differ by the given rows."""
    num, width = differences.shape
    base = np.abs(differences).max() + 1
    z = sparse.csr_array(np.vstack([base + differences, np.full_like(differences, base)]))
    names = np.arange(num).astype(str)
    return AuditCodes(
        weight=np.ones(width), reward=np.zeros(2 * num), tokens=np.ones(2 * num), z=z, sentence=z, ends=np.ones(2 * num, int),
        residual=np.zeros((2 * num, 1), np.float32), pair_ids=names, prompts=names if prompts is None else np.array(prompts),
        roles=np.full(num, "target"), subsets=np.full(num, "a"), chosen=np.arange(num), rejected=np.arange(num, 2 * num),
        required=np.zeros(num),
    )  # fmt: skip


def test_a_latent_that_leaves_the_target_alone_may_hold_another_group():
    target, other = group_of(np.array([[1.0, 0.0]])), group_of(np.array([[1.0, -1.0]]))
    edit = edit_for(target, {"other": other}, 1.0, 0.1, 5.0)
    np.testing.assert_allclose(edit.delta, [1.0, 0.9], atol=1e-6)


def least_change(
    target_S: np.ndarray, other_GS: np.ndarray, goal: float, tolerance: float, bound: float
) -> float | None:
    """|delta|_1 of the smallest edit, None if there is none: variables delta and its size u, |delta| <= u <= bound."""
    size, num = len(target_S), len(other_GS)
    eye, no = np.eye(size), np.zeros((num, size))
    rows = np.block(
        [[eye, -eye], [-eye, -eye], [other_GS, no], [-other_GS, no], [-target_S[None], np.zeros((1, size))]]
    )
    limits = np.concatenate([np.zeros(2 * size), np.full(2 * num, tolerance), [-goal]])
    cost = np.concatenate([np.zeros(size), np.ones(size)])
    bounds = [(None, None)] * size + [(0, bound)] * size
    found = optimize.linprog(cost, rows, limits, bounds=bounds, method="highs-ipm")
    return found.fun if found.status == 0 else None


def test_of_300_random_goals_none_in_reach_is_refused_and_no_edit_is_larger_than_the_optimum():
    rng, refused, gaps, in_reach = np.random.default_rng(0), [], [], 0
    for problem in range(300):
        target_S = rng.normal(size=30) * (rng.random(30) < 0.4)
        target = group_of(target_S[None])
        others = {f"g{i}": group_of(rng.normal(size=(1, 30))) for i in range(4)}
        goal = rng.uniform(0.5, 6.0)
        vectors = mean_difference(target), np.stack([mean_difference(one) for one in others.values()])
        optimum = least_change(*vectors, goal, 0.1, 0.5)
        in_reach += optimum is not None
        try:
            edit = edit_for(target, others, goal, 0.1, 0.5)
        except UserError:
            if optimum is not None:
                refused.append(problem)
            continue
        assert optimum is not None, "an edit was found that the reference says is not there"
        gaps.append(np.abs(edit.delta).sum() - optimum)
        assert edit.target_shift >= goal - 1e-6
        assert edit.largest_other_shift <= 0.1 + 1e-6
        assert np.abs(edit.delta).max() <= 0.5 + 1e-9
    assert 100 < in_reach < 300, "the reference finds goals of both kinds"
    assert refused == []
    assert max(gaps) <= 1e-6


def test_a_goal_at_the_very_edge_of_reach_is_met():
    rng = np.random.default_rng(1)
    for _ in range(20):
        target, others = group_of(rng.normal(size=(1, 12))), {"g": group_of(rng.normal(size=(1, 12)))}
        with pytest.raises(UserError) as error:
            edit_for(target, others, 1e6, 0.1, 0.5)
        assert "cannot be reached" in str(error.value)
        t_S, o_GS = mean_difference(target), mean_difference(others["g"])[None]
        rows = np.concatenate([o_GS, -o_GS])
        edge = -optimize.linprog(-t_S, rows, np.full(2, 0.1), bounds=(-0.5, 0.5), method="highs-ipm").fun
        assert edit_for(target, others, edge, 0.1, 0.5).target_shift == pytest.approx(edge, abs=1e-6)


def test_a_certificate_is_of_unseen_pairs_and_keeps_a_tolerance_only_with_its_whole_interval():
    delta = np.array([1.0, 0.0])
    target = group_of(np.array([[0.9, 0.0], [1.1, 0.0], [1.0, 0.0], [1.2, 0.0]]))
    steady, wild = (
        group_of(np.array([[0.05, 1.0]] * 20)),
        group_of(np.array([[2.0, 0.0], [-2.0, 0.0], [0.2, 0.0], [-0.1, 0.0]])),
    )
    found = certificate(delta, target, {"steady": steady}, 1.0, 0.1)
    assert found.target.moved.value == pytest.approx(1.05)
    assert found.goal_within
    assert found.others["steady"].moved.ci95 == pytest.approx([0.05, 0.05])
    assert found.tolerance_kept == "yes"
    # No pair of two prompts moved, which says nothing of the next prompt.
    still = group_of(np.array([[0.0, 1.0]] * 6), list("aaabbb"))
    found = certificate(delta, target, {"steady": steady, "still": still}, 1.0, 0.1)
    assert np.isnan(found.others["still"].moved.ci95).all()
    assert found.tolerance_kept == "undecided"
    assert certificate(delta, still, {"steady": steady}, 1.0, 0.1).goal_within is None
    # The mean is within the tolerance; what four such prompts say about it is not.
    assert certificate(delta, target, {"steady": steady, "wild": wild}, 1.0, 0.1).tolerance_kept == "undecided"
    assert certificate(delta, target, {"steady": steady}, 1.0, 0.01).tolerance_kept == "no"


def test_a_certificate_of_too_few_prompts_is_strict_json_and_says_so_on_the_page():
    still, one = group_of(np.array([[0.0, 1.0]] * 6), list("aaabbb")), group_of(np.array([[1.0, 0.0]] * 3), list("aaa"))
    measured = measure_edit(one, one.reward)
    content = {
        "edit": {"kind": "goal", "goal": 1.0, "tolerance": 0.1, "weights": []},
        **dict.fromkeys(("target", "off_target"), measured), "target_subsets": {}, "off_subsets": {}, "over_refusal": {},
        "specificity": {"margin": None, "accuracy": None},
        "certificate": {"solved_on": {"target_shift": 1.0, "largest_other_shift": 0.0}, **plain_values(certificate(np.array([1.0, 0.0]), one, {"still": still}, 1.0, 0.1))},
    }  # fmt: skip
    content = parse_json(json.dumps(finite_or_null(plain_values(content)), allow_nan=False))
    steering, proof = steering_sections("goal", content)
    assert steering.rows[0][3] == "n/a"
    assert [row[4] for row in proof.rows] == ["n/a", "n/a"]
    assert "stays open: the target has no interval" in proof.text
    assert "not every subset has an interval within it" in proof.text
    assert len(proof.text) < 380, "a page clips longer texts"
