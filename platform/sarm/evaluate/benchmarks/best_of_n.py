"""Own preferences: pairs, and prompts with n completions of which some are right.

Pairs: every (correct, wrong) pair of a row counts 1, 1/2 at an equal score, or 0; a row's pairs are averaged.
Best of K: chance that the highest-scored of K completions drawn without replacement is correct. With completions ranked
from best, the one at rank j of n is the pick of C(n - j, K - 1) of the C(n, K) draws; equal scores share their ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from sarm.evaluate.benchmarks.rows import Benchmark, Floats, Observations, ScoredRow, collect, plain_mean
from sarm.evaluate.statistics import pair_credit

_SIZES = (1, 2, 4, 8, 16, 32, 64)


def best_of(scores: Floats, num_correct: int, k: int) -> float:
    """Expected correctness of the best of k of the completions, the first `num_correct` of which are correct.

    Raises ValueError unless 1 <= k <= number of completions.
    """
    total = len(scores)
    if not 1 <= k <= total:
        raise ValueError(f"k must be between 1 and {total} completions, got {k}")
    order = np.argsort(-scores, kind="stable")
    chance = np.array([comb(total - rank, k - 1) / comb(total, k) for rank in range(1, total + 1)])
    correct = (order < num_correct).astype(float)
    # Completions of one score take each of their ranks equally often.
    _, group = np.unique(-scores[order], return_inverse=True)
    share = np.bincount(group, weights=correct) / np.bincount(group)
    return float((chance * share[group]).sum())


def observe_pairs(rows: Sequence[ScoredRow]) -> Observations:
    """The credit of each row, overall and for its subset."""
    return collect(_pairs(rows))


def _pairs(rows: Sequence[ScoredRow]) -> Iterator[tuple[str, ScoredRow, float]]:
    for row in rows:
        margins = (row.scores[: row.num_correct, None] - row.scores[None, row.num_correct :]).ravel()
        credit = float(pair_credit(margins).mean())
        yield "overall", row, credit
        if row.subset:
            yield row.subset, row, credit


def observe_best_of_n(rows: Sequence[ScoredRow]) -> Observations:
    """What `observe_pairs` gives, and the best-of-K curve over the rows that have K completions."""
    return collect((*_pairs(rows), *_curve(rows)))


def _curve(rows: Sequence[ScoredRow]) -> Iterator[tuple[str, ScoredRow, float]]:
    for row in rows:
        for k in _SIZES:
            if k <= len(row.scores):
                yield f"best_of_{k}", row, best_of(row.scores, row.num_correct, k)


def _as_they_are(means: Mapping[str, Any]) -> dict[str, Any]:
    return dict(means)


PAIRS = Benchmark("pairs", observe_pairs, _as_they_are, plain_mean)
BEST_OF_N = Benchmark("bon", observe_best_of_n, _as_they_are, plain_mean)
