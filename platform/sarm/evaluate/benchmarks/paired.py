"""Two models on the same rows: is the difference real?

Were the models equally good, which of the two gave which result would be chance, prompt by prompt: the rows of a prompt are one text's, so
they change sides together. p is the share of such swaps with a difference at least as large: all of them for few prompts that
differ, else P random ones (Phipson and Smyth 2010: (b + 1) / (P + 1)). Where each prompt has one row this is the exact McNemar test.
Holm: p-values sorted, the i-th of m times m - i + 1, so that over all subsets a false difference is claimed 5 % of the time at most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sarm.contracts.figures import OPTIONAL
from sarm.evaluate.benchmarks.benchmark import Benchmark
from sarm.evaluate.benchmarks.rows import Observations, ScoredRow
from sarm.evaluate.influence import (  # fmt: skip
    PerPart,
    Stratum,
    Sums,
    effective_prompts,
    gradients,
    of_part,
    single_part,
    variance_of,
)
from sarm.evaluate.intervals import (
    Z_95,
    Interval,
    could_be_chance,
    difference_interval,
    effective_difference,
    flat_difference,
)
from sarm.evaluate.statistics import cluster_sums, sign_flip_p_values
from sarm.settings.checks import UserError


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values in the order given."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class FigureDifference:
    """One figure of A, of B, and A - B."""

    a: float
    b: float
    difference: float
    difference_ci95: Interval
    num_differing_prompts: int
    p_swap: float


@dataclass(frozen=True)
class SubsetDifference:
    """The rows of a subset that one model alone gets right."""

    num_rows: int
    num_prompts: int
    only_a: int
    only_b: int
    p_swap: float
    p_holm: float
    """Adjusted over all subsets."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the rows that both have scored; `num_unmatched` are scored by one alone."""

    num_rows: int
    num_unmatched: int
    figures: dict[str, FigureDifference]
    subsets: dict[str, SubsetDifference]
    note: str | None = field(default=None, metadata=OPTIONAL)


def compare(
    benchmark: Benchmark, rows_a: Sequence[ScoredRow], rows_b: Sequence[ScoredRow], permutations: int, seed: int
) -> Comparison:
    """Every figure of A, of B and of A - B with its interval and p-value; and, by subset, the rows that one model alone gets right.

    Rows are joined by subset and id; those of one model only are counted in `num_unmatched`.
    Raises UserError if a row is of one prompt in A and of another in B: what each prompt adds to A - B is then unknown.
    """
    by_key = {(row.subset, row.row_id): row for row in rows_b}
    pairs = [(row, by_key[key]) for row in rows_a if (key := (row.subset, row.row_id)) in by_key]
    num_unmatched = len(rows_a) + len(rows_b) - 2 * len(pairs)
    if not pairs:
        return Comparison(0, num_unmatched, {}, {}, "no row was scored in both runs")
    _check_prompts(pairs)
    rows = [list(one) for one in zip(*pairs, strict=True)]
    of_a, of_b = (benchmark.figures(one) for one in rows)
    observed_a, observed_b = (benchmark.observe(one) for one in rows)
    a, b = Sums(observed_a), Sums(observed_b)
    by_figure = gradients(benchmark, a.parts, a.means)
    # What each prompt adds to A - B: the terms that change their sign when the models change places there.
    added_CF = np.stack([(a.sums - b.sums) @ (by_figure[name] / a.counts.sum(axis=0)) for name in of_a], axis=1)
    p_F = sign_flip_p_values(added_CF, permutations, seed)
    figures = {}
    for i, name in enumerate(of_a):
        gain, gradient_P = of_a[name] - of_b[name], by_figure[name]
        own = gradient_P != 0
        figures[name] = FigureDifference(
            a=of_a[name],
            b=of_b[name],
            difference=gain,
            difference_ci95=_interval(gain, gradient_P, (a, b), (observed_a, observed_b)),
            num_differing_prompts=int((a.sums[:, own] != b.sums[:, own]).any(axis=1).sum()),
            p_swap=float(p_F[i]),
        )
    return Comparison(len(pairs), num_unmatched, figures, _subsets(benchmark, pairs, permutations, seed))


def _interval(
    gain: float, gradient_P: PerPart, sums: tuple[Sums, Sums], observed: tuple[Observations, Observations]
) -> Interval:
    """As of any paired difference where the figure is one mean, else from the influences of the prompts on A - B."""
    a, b = sums
    if (part := single_part(a.parts, gradient_P)) is not None:
        (values_a, clusters), (values_b, _) = (of_part(one, part) for one in observed)
        return difference_interval(values_a - values_b, clusters)

    def unseen(stratum: Stratum) -> float:
        # None of n prompts departs from what all share; (0 + 2) / (n + 4) is the share that might, as for shares.
        departing = 2 / (stratum.effective + 4)
        variance = departing * (1 - departing) / stratum.effective
        shared = a.mean_of(stratum, gradient_P) - b.mean_of(stratum, gradient_P)
        return max(variance, (shared / Z_95) ** 2) if could_be_chance(len(stratum.prompts)) else variance

    strata = a.strata_of(gradient_P)
    found, prompts = variance_of(a.influence(gradient_P) - b.influence(gradient_P), strata, unseen), effective_prompts(strata)  # fmt: skip
    if not found.is_flat:
        return effective_difference(gain, found.value, prompts, found.df)
    own = gradient_P != 0
    return flat_difference(gain, prompts, int((a.sums[:, own] != b.sums[:, own]).any(axis=1).sum()))


def _check_prompts(pairs: Sequence[tuple[ScoredRow, ScoredRow]]) -> None:
    for a, b in pairs:
        if a.cluster != b.cluster:
            where = f"{a.subset} {a.row_id}".strip()
            raise UserError(f"row {where} is of prompt {a.cluster} in A and of {b.cluster} in B. Evaluate both on the same data again.")  # fmt: skip


def _subsets(
    benchmark: Benchmark, pairs: Sequence[tuple[ScoredRow, ScoredRow]], permutations: int, seed: int
) -> dict[str, SubsetDifference]:
    outcomes: dict[str, list[tuple[str, bool, bool]]] = {}
    for a, b in pairs:
        outcomes.setdefault(a.subset, []).append((a.cluster, benchmark.is_right(a), benchmark.is_right(b)))
    counts: dict[str, dict[str, int]] = {}
    p_values: dict[str, float] = {}
    for subset, own in outcomes.items():
        names, prompt_N = np.unique([cluster for cluster, _, _ in own], return_inverse=True)
        gain_N = np.array([float(a) - float(b) for _, a, b in own])
        p_values[subset] = float(sign_flip_p_values(cluster_sums(gain_N[:, None], prompt_N), permutations, seed)[0])
        counts[subset] = {
            "num_rows": len(own),
            "num_prompts": len(names),
            "only_a": int((gain_N > 0).sum()),
            "only_b": int((gain_N < 0).sum()),
        }
    adjusted = holm(p_values)
    return {
        subset: SubsetDifference(**one, p_swap=p_values[subset], p_holm=adjusted[subset])
        for subset, one in counts.items()
    }
