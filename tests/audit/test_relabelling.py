import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from sarm.audit.relabelling import (
    apply_changes,
    changed_pairs,
    changes_table,
    feature_scores,
    pair_scores,
    precision_recall,
    rankings,
)
from sarm.audit.selection import Selection
from sarm.contracts.tables import PAIRS_TABLE
from sarm.settings.checks import UserError
from sarm.training.objective import Objective

SELECTION = Selection(np.array([1, 2]), np.array([1, -1]))


def test_a_pair_scores_safe_minus_unsafe_per_sentence(codes):
    for site in ("reward", "sentence"):
        z = codes.at(site).toarray()
        ends = np.maximum(codes.ends, 1) if site == "sentence" else np.ones(len(z))
        g = (z[:, 1] - z[:, 2]) / ends
        np.testing.assert_allclose(pair_scores(codes, SELECTION, site), g[codes.chosen] - g[codes.rejected])


def test_without_a_feature_every_pair_has_the_same_score(codes):
    none = Selection(np.array([], dtype=np.int64), np.array([], dtype=np.int64))
    found = feature_scores(codes, none)
    assert len(found) == 2
    assert all(not scores.any() for scores in found.values())


def test_budgets_are_nested_and_ends_of_one_ranking():
    suspicion = np.random.default_rng(0).permutation(200).astype(float)
    ids = np.array([f"{i:03d}" for i in range(200)])
    small, large = (changed_pairs(suspicion, share, "flip", ids) for share in (0.025, 0.05))
    assert len(small) == 5
    assert large[:5].tolist() == small.tolist()
    assert sorted(suspicion[large]) == list(range(10))
    assert sorted(suspicion[changed_pairs(suspicion, 0.05, "drop", ids)]) == list(range(190, 200))
    tied = changed_pairs(np.zeros(200), 0.05, "flip", ids[::-1])
    assert tied.tolist() == list(range(199, 189, -1)), "ties go by id, not by row"


def test_missing_scores_and_empty_budgets_are_refused():
    ids = np.array(["a", "b", "c"])
    with pytest.raises(UserError, match="1 of 3 pairs have no score"):
        changed_pairs(np.array([0.0, np.nan, 1.0]), 0.4, "flip", ids)
    with pytest.raises(UserError, match=r"10\.0% of 3 pairs is none"):
        changed_pairs(np.zeros(3), 0.1, "flip", ids)


def pairs_table() -> pa.Table:
    rows = [
        {
            "pair_id": f"p{i}",
            "prompt_id": f"q{i // 2}",
            "prompt": [{"role": "user", "content": "?"}],
            "chosen": f"good {i}",
            "rejected": f"bad {i}",
            "source": "made",
            "split": "train",
            "subset": None,
            "margin": 0.5 if i else None,
        }
        for i in range(6)
    ]
    return pa.Table.from_pylist(rows, schema=PAIRS_TABLE)


def test_flips_are_taken_back_by_flipping_again_and_drops_leave_the_rest_alone():
    pairs, ids = pairs_table(), np.array([f"p{i}" for i in range(6)])
    flipped = changes_table(np.array([3, 0]), "flip", np.arange(6.0), ids)
    poisoned = apply_changes(pairs, flipped)
    assert poisoned["chosen"].to_pylist() == ["bad 0", "good 1", "good 2", "bad 3", "good 4", "good 5"]
    assert poisoned["margin"].to_pylist() == [None, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert apply_changes(poisoned, flipped).equals(pairs)
    dropped = apply_changes(pairs, changes_table(np.array([5, 1]), "drop", np.arange(6.0), ids))
    assert dropped["pair_id"].to_pylist() == ["p0", "p2", "p3", "p4"]
    with pytest.raises(UserError, match="1 changed pairs are not among these, first p9"):
        apply_changes(pairs, changes_table(np.array([0]), "flip", np.zeros(1), np.array(["p9"])))


def test_a_flipped_pair_has_the_gradient_of_the_flipped_label():
    pairs = pairs_table()
    ids = np.array(pairs["pair_id"].to_pylist())
    poisoned = apply_changes(pairs, changes_table(np.array([3]), "flip", np.arange(6.0), ids)).to_pylist()
    rewards = {text: torch.tensor(0.0, requires_grad=True) for text in ("good 3", "bad 3")}
    row = poisoned[3]
    reward_N = torch.stack([rewards[row["chosen"]], rewards[row["rejected"]]])
    Objective()(SimpleNamespace(logits=reward_N[:, None]), [0], [1], [row["margin"]]).sum().backward()
    # At equal rewards a margin of 0.5 is missed by 0.5, whichever response is said to be the better one.
    pull = 1 / (1 + math.exp(-0.5))
    assert rewards["bad 3"].grad.item() == pytest.approx(-pull, abs=1e-6)
    assert rewards["good 3"].grad.item() == pytest.approx(pull, abs=1e-6)


def test_a_flipped_label_is_found_again_by_its_features(codes):
    train = codes.role("select")
    rng = np.random.default_rng(0)
    is_noisy = np.zeros(train.num_pairs, dtype=bool)
    is_noisy[rng.choice(train.num_pairs, 4, replace=False)] = True
    noisy = replace(
        train,
        chosen=np.where(is_noisy, train.rejected, train.chosen),
        rejected=np.where(is_noisy, train.chosen, train.rejected),
    )
    ranked = rankings(
        {"features": pair_scores(noisy, SELECTION, "reward")}, noisy.margins, noisy.margins, noisy.log_length, rng
    )
    share = 4 / train.num_pairs + 1e-9
    found = {
        name: precision_recall(changed_pairs(s, share, "drop", noisy.pair_ids), is_noisy) for name, s in ranked.items()
    }
    assert found["features"] == found["loss"] == (1.0, 1.0)
    assert found["random"].precision < 1.0
    assert found["length"].precision < 1.0
    assert ranked["margin"].max() < 0, "margin ranks by certainty, loss by surprise"
