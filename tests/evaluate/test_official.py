"""Our scores against those of the published rewardbench 0.1.4, which lives in an environment of its own (`make test-official`)."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sarm.evaluate.benchmarks.reward_bench import REWARD_BENCH, SECTIONS
from sarm.evaluate.benchmarks.reward_bench_2 import REWARD_BENCH_2, ties_score_0_1_4
from sarm.evaluate.benchmarks.rows import ScoredRow

ROOT = Path(__file__).parent.parent.parent
PYTHON = Path(os.environ.get("OFFICIAL_PYTHON", ROOT / ".venv-official" / "bin" / "python"))
NUM_CASES = 1000

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"rewardbench 0.1.4 needs its own environment ({PYTHON}): make test-official"
)


def row(subset: str, row_id: str, scores: list[float], num_correct: int = 1) -> ScoredRow:
    zeros = np.zeros(len(scores))
    return ScoredRow(subset, row_id, row_id, num_correct, np.array(scores, float), zeros, zeros)


@pytest.fixture(scope="module")
def cases() -> dict:
    rng = np.random.default_rng(0)
    best_of_n, ties, pairs = [], [], []
    for _ in range(NUM_CASES):
        coarse = rng.random() < 0.5
        draw = (lambda: float(rng.integers(-2, 3))) if coarse else (lambda: float(rng.normal()))
        best_of_n.append([[draw() for _ in range(4)] for _ in range(rng.integers(1, 12))])
        rows = []
        for number in range(rng.integers(1, 20)):
            present = rng.choice(["both", "both", "both", "ref", "tied"])
            if present != "tied":
                rows.append(
                    {"id": f"ref:{number}", "num_correct": 1, "scores": [draw() for _ in range(rng.integers(2, 8))]}
                )
            if present != "ref":
                total = int(rng.integers(3, 12))
                num_correct = int(rng.integers(1, total + 1))
                rows.append(
                    {"id": f"tied:{number}", "num_correct": num_correct, "scores": [draw() for _ in range(total)]}
                )
        rng.shuffle(rows)
        ties.append(rows)
        names = [name for section in SECTIONS.values() for name in section if rng.random() < 0.6]
        pairs.append({name: [[draw(), draw()] for _ in range(rng.integers(1, 9))] for name in names})
    return {"best_of_n": best_of_n, "ties": ties, "reward_bench": pairs}  # fmt: skip


@pytest.fixture(scope="module")
def official(cases: dict) -> dict:
    done = subprocess.run(
        [str(PYTHON), str(Path(__file__).parent / "official" / "score.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["version"] == "0.1.4"
    return found


def test_best_of_n_subsets_are_equal_to_the_last_bit(cases, official):
    ours = [
        REWARD_BENCH_2.figures([row("Math", str(i), s) for i, s in enumerate(case)])["Math"]
        for case in cases["best_of_n"]
    ]
    assert ours == official["best_of_n"]


def test_ties_by_the_packages_rules_are_equal_to_the_last_bit(cases, official):
    ours = [
        ties_score_0_1_4([row("Ties", r["id"], r["scores"], r["num_correct"]) for r in case]) for case in cases["ties"]
    ]
    assert [None if math.isnan(value) else value for value in ours] == official["ties"]
    assert len(set(ours)) > NUM_CASES / 2, "the cases are too alike to tell rules apart"


def test_sections_of_version_1_are_equal_to_the_last_bit(cases, official):
    for case, theirs in zip(cases["reward_bench"], official["reward_bench"], strict=True):
        ours = REWARD_BENCH.figures([row(s, str(i), p) for s, pairs in case.items() for i, p in enumerate(pairs)])
        # The package writes 0 for a section without a row; we leave it out.
        assert {name: ours.get(name, 0) for name in SECTIONS} == theirs
