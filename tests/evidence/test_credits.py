"""Many trainings as one figure: a pair counts once, whatever the seeds; models are compared where both were measured."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.evidence import credits

from sarm.evaluate.intervals import difference_interval, share_interval


def piece(fold: int, seed: int, recipe: str = "ours", **models: list[float]) -> dict[str, Any]:
    pairs = [f"{fold}-{n}" for n in range(4)]
    return {"fold": fold, "seed": seed, "recipe": recipe, "pairs": pairs, "prompts": [f"{fold}-a", f"{fold}-a", f"{fold}-b", f"{fold}-c"], "credits": models}  # fmt: skip


FOUND = [
    piece(0, 0, sarm=[1, 1, 0, 1], scalar_head=[1, 0, 0, 1]),
    piece(0, 1, sarm=[1, 0, 0, 1], scalar_head=[1, 1, 1, 1]),
    piece(1, 0, sarm=[1, 1, 1, 0.5], scalar_head=[0, 1, 1, 1]),
]


def test_accuracy_is_the_mean_over_pairs_of_the_mean_over_seeds() -> None:
    found = credits.accuracy(FOUND, "sarm")
    assert found is not None
    by_hand = np.array([1, 0.5, 0, 1, 1, 1, 1, 0.5])
    prompts = np.array(["0a", "0a", "0b", "0c", "1a", "1a", "1b", "1c"])
    assert found.value == by_hand.mean()
    assert (found.low, found.high) == tuple(share_interval(by_hand, prompts))
    assert (found.prompts, found.seeds) == (6, 1), "the fold with the fewest seeds counts"


def test_a_difference_is_of_the_same_pairs_and_pieces() -> None:
    only_one = piece(2, 0, sarm=[0, 0, 0, 0])
    found = credits.difference([*FOUND, only_one], "sarm", "scalar_head")
    assert found is not None
    by_hand = np.array([0, 0, -0.5, 0, 1, 0, 0, -0.5])
    prompts = np.array(["0a", "0a", "0b", "0c", "1a", "1a", "1b", "1c"])
    assert found.value == by_hand.mean() == 0.0
    assert (found.low, found.high) == tuple(difference_interval(by_hand, prompts))
    assert found.prompts == 6


def test_nothing_measured_is_no_figure() -> None:
    assert credits.accuracy([], "sarm") is None
    assert credits.difference(FOUND, "sarm", "random_encoder") is None


def test_recipes_of_one_fold_and_seed_stand_beside_each_other() -> None:
    papers = piece(0, 0, "papers", sarm=[0, 0, 0, 0])
    joined = credits.joined([*FOUND, papers], {"ours:sarm": "sarm", "papers:sarm": "papers"})
    assert [sorted(one["credits"]) for one in joined] == [["papers", "sarm"], ["sarm"], ["sarm"]]
    assert FOUND[0]["credits"].keys() == {"sarm", "scalar_head"}, "pieces stay as they are"
    papers["pairs"] = ["other"] * 4
    with pytest.raises(ValueError, match="fold 0, seed 0 scored different pairs"):
        credits.joined([*FOUND, papers], {"ours:sarm": "sarm"})


def test_credits_of_an_evaluation_are_in_one_order_for_all_models(tmp_path: Path) -> None:
    for name, order in (("sarm", [2, 0, 1]), ("scalar_head", [0, 1, 2])):
        rows = [{"pair_id": f"p{n}", "prompt_id": f"q{n // 2}", "chosen_reward": 1.0 * n, "rejected_reward": 1.0} for n in order]  # fmt: skip
        (tmp_path / f"{name}_scores").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}_scores" / "part-000000.parquet")
    found = credits.of_evaluation(tmp_path, {"sarm": "sarm", "scalar_head": "scalar_head", "papers": "absent"})
    assert found["pairs"] == ["p0", "p1", "p2"]
    assert found["prompts"] == ["q0", "q0", "q1"]
    assert found["credits"] == {"sarm": [0.0, 0.5, 1.0], "scalar_head": [0.0, 0.5, 1.0]}
