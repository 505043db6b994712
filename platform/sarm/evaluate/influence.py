"""Intervals of a benchmark's figures, from what each prompt does to them. C clusters (prompts), P parts (means a benchmark is made of).

A figure that is one mean takes `share_interval`, as every other accuracy does. Any other is a weighted sum of parts, g_p = d figure / d mean_p,
Ties and RM-Bench included, and prompt c moves it by u_c = sum_p g_p (sum_cp - n_cp mean_p) / n_p. Its variance is
sum_s C_s / (C_s - 1) sum_c (u_c - mean u)^2 over strata s of prompts (those that occur in the same subsets), with Satterthwaite's degrees of
freedom; its interval is Wilson's of value (1 - value) / variance cases with Student's t. A stratum whose prompts all move the figure alike, or that has one
prompt, shows no variance. Of x right in n effective prompts it is given that of the share (x + 2) / (n + 4) (Agresti and Coull 1998). Where a figure is at 0 or 1, Wilson's
interval of as many prompts as would say as much if all weighed alike.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Shaped
from numpy.typing import NDArray

from sarm.evaluate.benchmarks.benchmark import Benchmark
from sarm.evaluate.benchmarks.rows import Observations, ScoredRow
from sarm.evaluate.intervals import Interval, effective_wilson, share_interval

PerPart = Float64[NDArray[np.float64], " parts"]
PerPrompt = Float64[NDArray[np.float64], " prompts"]
# A combination of subsets with fewer prompts stands together with the other rare combinations.
_SMALLEST_STRATUM = 10
_NO_VARIANCE = 1e-24


class Stratum(NamedTuple):
    """Prompts that occur in the same subsets: their places, their share of a figure, and how many of one size would say as much."""

    prompts: Int[NDArray[np.intp], " prompts"]
    weight: float
    effective: float


class Sums:
    """Sums and counts of each part by prompt, [C, P], the prompts in strata."""

    def __init__(self, observed: Observations):
        names, self.parts = sorted(set(observed.clusters)), list(dict.fromkeys(observed.parts))
        place, column = ({name: i for i, name in enumerate(listed)} for listed in (names, self.parts))
        self.sums, self.counts = np.zeros((len(names), len(self.parts))), np.zeros((len(names), len(self.parts)))
        at = ([place[cluster] for cluster in observed.clusters], [column[part] for part in observed.parts])
        np.add.at(self.sums, at, observed.values)
        np.add.at(self.counts, at, 1.0)
        subsets: list[set[str]] = [set() for _ in names]
        for cluster, subset in zip(observed.clusters, observed.subsets, strict=True):
            subsets[place[cluster]].add(subset)
        keys = ["\x1f".join(sorted(found)) for found in subsets]
        sizes = Counter(keys)
        merged = ["" if "\x1f" in key and sizes[key] < _SMALLEST_STRATUM else key for key in keys]
        self.strata = [np.flatnonzero([key == own for own in merged]) for key in dict.fromkeys(merged)]

    @property
    def means(self) -> PerPart:
        """Mean of each part."""
        return np.asarray(self.sums.sum(axis=0) / self.counts.sum(axis=0))

    def influence(self, gradient_P: PerPart) -> PerPrompt:
        """How far each prompt moves a figure of this gradient, were it to count a little more."""
        centred_CP = self.sums - self.counts * self.means
        return np.asarray(centred_CP @ (gradient_P / self.counts.sum(axis=0)))

    def strata_of(self, gradient_P: PerPart) -> list[Stratum]:
        """The strata that a figure of this gradient rests on."""
        rows_C = self.counts[:, gradient_P != 0].sum(axis=1)
        weight_C = self.counts @ (gradient_P / self.counts.sum(axis=0))
        return [
            Stratum(own, float(weight_C[own].sum()), float(rows_C[own].sum() ** 2 / np.square(rows_C[own]).sum()))
            for own in self.strata
            if rows_C[own].any()
        ]

    def mean_of(self, stratum: Stratum, gradient_P: PerPart) -> float:
        """Mean of a stratum, its parts weighted as in the figure of this gradient."""
        return float((self.sums[stratum.prompts] @ (gradient_P / self.counts.sum(axis=0))).sum()) / stratum.weight


class Variance(NamedTuple):
    """Variance of a figure, Satterthwaite's degrees of freedom of it, and whether no prompt moves the figure."""

    value: float
    df: float
    is_flat: bool


def effective_prompts(strata: Sequence[Stratum]) -> float:
    """How many prompts of one size and weight would say as much."""
    total = sum(one.weight for one in strata)
    return total**2 / sum(one.weight**2 / one.effective for one in strata)


def gradients(benchmark: Benchmark, parts: Sequence[str], means_P: PerPart) -> dict[str, PerPart]:
    """d figure / d mean of every figure, [P]. Figures are weighted sums of parts, so that a step of any size is exact."""
    stepped = means_P + np.vstack([np.zeros(len(parts)), np.eye(len(parts))])
    found = benchmark.combine(dict(zip(parts, stepped.T, strict=True)))
    steps = {name: values[1:] - values[0] for name, values in found.items()}
    return {name: np.where(np.abs(step) > 1e-12, step, 0.0) for name, step in steps.items()}


def single_part(parts: Sequence[str], gradient_P: PerPart) -> str | None:
    """The part that a figure is the mean of; None if it is made of several."""
    own = np.flatnonzero(gradient_P)
    return parts[own[0]] if len(own) == 1 and abs(gradient_P[own[0]] - 1) < 1e-9 else None


def variance_of(influence_C: PerPrompt, strata: Sequence[Stratum], unseen: Callable[[Stratum], float]) -> Variance:
    """Sum of the strata's variances; `unseen` is that of the mean of a stratum which shows none."""
    total = uncertain = 0.0
    for stratum in strata:
        u, num = influence_C[stratum.prompts], len(stratum.prompts)
        variance = num / (num - 1) * float(np.square(u - u.mean()).sum()) if num > 1 else 0.0
        if variance < _NO_VARIANCE:
            total += stratum.weight**2 * unseen(stratum)
        else:
            total += variance
            uncertain += variance**2 / (num - 1)
    return Variance(total, total**2 / uncertain if uncertain else np.inf, uncertain == 0)


def figure_intervals(benchmark: Benchmark, rows: Sequence[ScoredRow]) -> dict[str, Interval]:
    """The 95 % interval of every figure of a benchmark."""
    if not rows:
        return {}
    observed = benchmark.observe(rows)
    sums = Sums(observed)
    by_figure = gradients(benchmark, sums.parts, sums.means)
    return {name: _interval(value, by_figure[name], sums, observed) for name, value in benchmark.figures(rows).items()}


def of_part(
    observed: Observations, part: str
) -> tuple[Float64[NDArray[np.float64], " values"], Shaped[NDArray[np.str_], " values"]]:
    """The values of one part and the prompt of each."""
    is_own = [i for i, name in enumerate(observed.parts) if name == part]
    return np.array([observed.values[i] for i in is_own]), np.array([observed.clusters[i] for i in is_own])


def _interval(value: float, gradient_P: PerPart, sums: Sums, observed: Observations) -> Interval:
    if (part := single_part(sums.parts, gradient_P)) is not None:
        return share_interval(*of_part(observed, part))
    strata = sums.strata_of(gradient_P)

    def unseen(stratum: Stratum) -> float:
        mean = min(max(sums.mean_of(stratum, gradient_P), 0.0), 1.0)
        shrunk = (mean * stratum.effective + 2) / (stratum.effective + 4)
        return shrunk * (1 - shrunk) / stratum.effective

    # The Ties score can leave [0, 1] by a hundredth.
    share = min(max(value, 0.0), 1.0)
    if not 0 < share < 1:
        low, high = effective_wilson(share, effective_prompts(strata), np.inf)
    else:
        found = variance_of(sums.influence(gradient_P), strata, unseen)
        low, high = effective_wilson(share, share * (1 - share) / found.value, found.df)
    return Interval(min(low, value), max(high, value))
