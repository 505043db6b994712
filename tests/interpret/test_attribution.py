import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sarm.contracts.tables import FEATURES_TABLE, PAIR_SCORES_TABLE
from sarm.interpret.attribution import (
    check_completeness,
    feature_table,
    mean_contribution,
    pair_explanation,
    top_features,
)
from sarm.settings.checks import UserError

WEIGHT_S = np.array([1.0, -2.0, 0.5, 3.0, 0.0], np.float32)


def score_row(pair_id, chosen, rejected, weight_S=WEIGHT_S):
    """A PAIR_SCORES row from `{latent: value}` of each side, rewards included."""
    row = {"pair_id": pair_id, "prompt_id": pair_id, "subset": None, "chosen_tokens": 1, "rejected_tokens": 1}
    for side, codes in (("chosen", chosen), ("rejected", rejected)):
        row[f"{side}_latents"], row[f"{side}_values"] = list(codes), list(codes.values())
        row[f"{side}_reward"] = sum(float(weight_S[i]) * z for i, z in codes.items())
    return row


def table_of(*rows):
    return pa.Table.from_pylist(list(rows), schema=PAIR_SCORES_TABLE)


TWO_PAIRS = table_of(score_row("p", {0: 2.0, 1: 1.0}, {1: 3.0}), score_row("q", {0: 4.0}, {2: 2.0, 4: 1.0}))

codes = st.dictionaries(st.integers(0, 19), st.floats(0, 50, width=32), max_size=6)


def test_feature_table_matches_hand_numbers():
    features = feature_table(TWO_PAIRS, WEIGHT_S)
    assert features.schema == FEATURES_TABLE
    assert features["latent"].to_pylist() == [0, 1, 2, 4]
    assert features["frequency_chosen"].to_pylist() == [1, 0.5, 0, 0]
    assert features["frequency_rejected"].to_pylist() == [0, 0.5, 0.5, 0.5]
    assert features["mean_contribution_chosen"].to_pylist() == [3, -1, 0, 0]
    assert features["mean_contribution_rejected"].to_pylist() == [0, -3, 0.5, 0]
    assert features["mean_margin_contribution"].to_pylist() == [3, 2, -0.5, 0]


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(codes, codes), min_size=1, max_size=5),
    weights=st.lists(st.floats(-5, 5, width=32), min_size=20, max_size=20),
)
def test_contributions_sum_to_rewards_and_margins(pairs, weights):
    weight_S = np.array(weights, np.float32)
    scores = table_of(*(score_row(str(i), c, r, weight_S) for i, (c, r) in enumerate(pairs)))
    features = feature_table(scores, weight_S)
    rewards = {side: scores[f"{side}_reward"].to_numpy() for side in ("chosen", "rejected")}
    for side in rewards:
        total = features[f"mean_contribution_{side}"].to_numpy().astype(float).sum()
        assert total == pytest.approx(rewards[side].mean(dtype=float), rel=1e-4, abs=1e-2)
    assert check_completeness(scores, weight_S) <= 1e-4 * max(
        1, *np.abs(rewards["chosen"]), *np.abs(rewards["rejected"])
    )
    explained = pair_explanation(scores, "0", weight_S, 3)
    total = sum(share.contribution for share in explained.contributions) + explained.rest
    assert total == pytest.approx(explained.margin, rel=1e-4, abs=1e-2)


def test_feature_table_agrees_with_a_loop_over_responses():
    rng = np.random.default_rng(0)
    weight_S = rng.normal(size=50).astype(np.float32)
    rows = [
        score_row(str(i), *({int(j): float(rng.random()) for j in rng.choice(50, 5, False)} for _ in "cr"), weight_S)
        for i in range(40)
    ]
    features = feature_table(table_of(*rows), weight_S)
    for row in features.to_pylist():
        i = row["latent"]
        values = [dict(zip(r["chosen_latents"], r["chosen_values"], strict=True)).get(i, 0.0) for r in rows]
        assert row["mean_contribution_chosen"] == pytest.approx(weight_S[i] * np.mean(values), abs=1e-6)
        assert row["frequency_chosen"] == pytest.approx(np.mean(np.array(values) > 0))


def test_attribution_does_not_depend_on_chunks_slices_or_row_order():
    chunked = pa.concat_tables([TWO_PAIRS.slice(1, 1), TWO_PAIRS.slice(0, 1)])
    assert feature_table(chunked, WEIGHT_S).equals(feature_table(TWO_PAIRS, WEIGHT_S))
    assert check_completeness(chunked, WEIGHT_S) == 0
    assert check_completeness(TWO_PAIRS.slice(1), WEIGHT_S) == 0


def test_slots_that_topk_left_at_zero_do_not_count_as_firing():
    features = feature_table(table_of(score_row("p", {0: 1.0, 3: 0.0}, {3: 0.0})), WEIGHT_S)
    assert features["latent"].to_pylist() == [0]


def test_completeness_reports_a_reward_that_its_latents_do_not_explain():
    row = score_row("p", {0: 2.0}, {1: 1.0})
    row["rejected_reward"] += 0.25
    assert check_completeness(table_of(row), WEIGHT_S) == pytest.approx(0.25)
    row["rejected_reward"] = float("inf")
    assert np.isnan(check_completeness(table_of(row), WEIGHT_S))


def test_top_features_split_by_sign_strongest_first():
    top = top_features(feature_table(TWO_PAIRS, WEIGHT_S), 5)
    assert top.raising["latent"].to_pylist() == [0, 2]
    assert top.lowering["latent"].to_pylist() == [1]
    assert top_features(feature_table(TWO_PAIRS, WEIGHT_S), 1).raising["latent"].to_pylist() == [0]


def test_pair_explanation_names_the_largest_and_sums_the_rest():
    explained = pair_explanation(TWO_PAIRS, "p", WEIGHT_S, 1)
    (share,) = explained.contributions
    assert (share.latent, share.chosen_value, share.rejected_value, share.contribution) == (1, 1, 3, 4)
    assert (explained.margin, explained.rest, explained.num_rest) == (6, 2, 1)


def test_an_empty_table_has_no_features_and_no_gap():
    assert feature_table(table_of(), WEIGHT_S).num_rows == 0
    assert check_completeness(table_of(), WEIGHT_S) == 0


def test_scores_without_latents_of_another_head_or_pair_are_refused():
    scalar = score_row("p", {}, {})
    scalar["chosen_latents"] = None
    with pytest.raises(UserError, match="no latents"):
        feature_table(table_of(scalar), WEIGHT_S)
    with pytest.raises(UserError, match="d_sae=3"):
        feature_table(TWO_PAIRS, WEIGHT_S[:3])
    with pytest.raises(UserError, match="'z'"):
        pair_explanation(TWO_PAIRS, "z", WEIGHT_S, 1)


def test_what_fires_on_every_response_is_an_intercept_and_neither_raises_nor_lowers():
    always = table_of(score_row("p", {0: 2.0, 1: 1.0}, {0: 3.0}), score_row("q", {0: 4.0}, {0: 1.0, 2: 2.0}))
    features = feature_table(always, WEIGHT_S)
    top = top_features(features, 5)
    assert top.always_on["latent"].to_pylist() == [0]
    assert top.intercept == pytest.approx(float(WEIGHT_S[0]) * 2.5)
    assert 0 not in [*top.raising["latent"].to_pylist(), *top.lowering["latent"].to_pylist()]
    listed = [*mean_contribution(top.raising), *mean_contribution(top.lowering)]
    rewards = np.concatenate([always["chosen_reward"].to_numpy(), always["rejected_reward"].to_numpy()])
    assert top.intercept + sum(listed) == pytest.approx(rewards.mean()), "nothing is counted twice, and nothing lost"
    assert top_features(feature_table(TWO_PAIRS, WEIGHT_S), 5).intercept == 0
