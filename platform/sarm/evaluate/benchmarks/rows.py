"""Scored benchmark rows, and what a benchmark's means are taken over.

A row is one prompt with its completions, the correct ones first. Rows of one prompt form a cluster: a prompt is the unit of intervals and tests.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

PerCompletion = Float64[NDArray[np.float64], " completions"]


class ScoredRow(NamedTuple):
    """One prompt: `scores`, `tokens` and `markup` by completion, the first `num_correct` of which are correct."""

    subset: str
    row_id: str
    cluster: str
    num_correct: int
    scores: PerCompletion
    tokens: PerCompletion
    markup: PerCompletion


class Observations(NamedTuple):
    """What a benchmark's means are taken over: `values[n]` counts towards the mean `parts[n]` and belongs to prompt `clusters[n]`."""

    parts: list[str]
    clusters: list[str]
    values: list[float]
    subsets: list[str]

    def by_part(self) -> dict[str, list[float]]:
        """The values of each mean, in row order."""
        found: dict[str, list[float]] = {}
        for part, value in zip(self.parts, self.values, strict=True):
            found.setdefault(part, []).append(value)
        return found


def plain_mean(_: str, values: Sequence[float]) -> float:
    """Sum from left to right over count, as the official code divides its correct answers by its total."""
    return sum(values) / len(values)


def collect(found: Iterable[tuple[str, ScoredRow, float]]) -> Observations:
    """Observations of (part, row, value)."""
    listed = list(found)
    return Observations(
        [part for part, _, _ in listed],
        [row.cluster for _, row, _ in listed],
        [float(value) for _, _, value in listed],
        [row.subset for _, row, _ in listed],
    )
