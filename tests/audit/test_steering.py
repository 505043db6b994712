import numpy as np
import pytest

from sarm.audit.goals import edit_for, mean_difference
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
from sarm.config import UserError
from sarm.data.statistics import pair_credit

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
    low, high = on_target["margin_shift"]["ci95"]
    assert 0 < low < on_target["margin_shift"]["value"] < high
    assert on_off["margin_shift"] == {"value": 0.0, "ci95": [0.0, 0.0]}
    assert on_target["affected"]["value"] == 1.0
    assert on_off["affected"]["value"] == 0.0
    assert on_target["accuracy_change"]["value"] == pytest.approx(
        on_target["accuracy_after"]["value"] - on_target["accuracy_before"]["value"]
    )
    assert specificity(on_target["margin_shift"]["value"], [on_off["margin_shift"]["value"]]) == 1.0
    assert specificity(-0.2, [0.1, -0.2]) == 0.5
    assert specificity(0.0, [0.0]) is None


def test_an_effect_beside_its_controls():
    found = against_controls(-3.0, np.array([1.0, -1.0, 0.5, 2.0]))
    assert found["control_median"] == 1.0
    assert found["ratio"] == 3.0
    assert found["p"] == pytest.approx(1 / 5)
    assert against_controls(1.0, np.zeros(3))["ratio"] == float("inf")
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
