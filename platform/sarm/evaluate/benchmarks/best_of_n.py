"""Own preferences: prompts with n completions of which some are right.

Pairs of a correct and a wrong completion count as in `pairs`. Best of K: chance that the highest-scored of K completions drawn without replacement is correct. With completions ranked
from best, the one at rank j of n is the pick of C(n - j, K - 1) of the C(n, K) draws; equal scores share their ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from sarm.evaluate.benchmarks.benchmark import Benchmark, Parsed
from sarm.evaluate.benchmarks.fields import prompt_in, texts_in
from sarm.evaluate.benchmarks.pairs import credits_of
from sarm.evaluate.benchmarks.rows import Observations, PerCompletion, ScoredRow, collect

_SIZES = (1, 2, 4, 8, 16, 32, 64)


def best_of(scores: PerCompletion, num_correct: int, k: int) -> float:
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


def parse(fields: Mapping[str, Any]) -> Parsed:
    """prompt, chosen [..], rejected [..], and a subset if there is one."""
    subset = fields.get("subset")
    name = subset if isinstance(subset, str) else ""
    return Parsed(prompt_in(fields), texts_in(fields, "chosen"), texts_in(fields, "rejected"), name)


def observe(rows: Sequence[ScoredRow]) -> Observations:
    """The credit of each row's pairs, and the best-of-K curve over the rows that have K completions."""
    return collect((*credits_of(rows), *_curve(rows)))


def _curve(rows: Sequence[ScoredRow]) -> Iterator[tuple[str, ScoredRow, float]]:
    for row in rows:
        for k in _SIZES:
            if k <= len(row.scores):
                yield f"best_of_{k}", row, best_of(row.scores, row.num_correct, k)


BEST_OF_N = Benchmark(name="best_of_n", title="Best of n", prefix="bon", parse=parse, observe=observe)
