"""Scored benchmark rows, from the per-completion table that every figure is recomputed from.

A row is one prompt with its completions, the correct ones first. Rows of one prompt form a cluster: a prompt is the unit of intervals and tests.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class ScoredRow(NamedTuple):
    """One prompt: `scores`, `tokens` and `markup` by completion, the first `num_correct` of which are correct."""

    subset: str
    row_id: str
    cluster: str
    num_correct: int
    scores: Floats
    tokens: Floats
    markup: Floats


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


class Benchmark(NamedTuple):
    """How a benchmark turns scores into figures. `combine` also takes means with leading axes, one entry a set of means."""

    prefix: str
    observe: Callable[[Sequence[ScoredRow]], Observations]
    combine: Callable[[Mapping[str, Any]], dict[str, Any]]
    mean: Callable[[str, Sequence[float]], float]

    def figures(self, rows: Sequence[ScoredRow]) -> dict[str, float]:
        """Every figure of the rows, in the order of the official code's floating-point sums."""
        found = self.observe(rows).by_part()
        means = {part: self.mean(part, values) for part, values in found.items()}
        return {name: float(value) for name, value in self.combine(means).items()}


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


def scored_rows(items: pa.Table, benchmark: str, variant: str = "") -> list[ScoredRow]:
    """The rows of one benchmark (and of one edit of its texts) whose completions all have a finite score, in file order."""
    wanted = pc.and_(pc.equal(items["benchmark"], benchmark), pc.equal(items["variant"], variant))
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in items.filter(wanted).to_pylist():
        rows.setdefault((item["subset"], item["row_id"]), []).append(item)
    usable = []
    for (subset, row_id), members in rows.items():
        members.sort(key=lambda item: item["completion"])
        if all(item["score"] is not None and np.isfinite(item["score"]) for item in members):
            usable.append(
                ScoredRow(
                    subset,
                    row_id,
                    members[0]["cluster"],
                    sum(item["correct"] for item in members),
                    *(np.array([item[k] for item in members], float) for k in ("score", "num_tokens", "markup")),
                )
            )
    return usable
