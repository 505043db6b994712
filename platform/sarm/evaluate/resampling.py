"""Bootstrap over prompts. C clusters, P parts (means a benchmark is made of), F figures, R resamples.

Every figure is a function of means over rows, Ties and RM-Bench included, so a resample of prompts is a vector of counts:
mean_p = sum_c count_c sum_cp / sum_c count_c n_cp, and the figures are combined from these means afresh in each resample.
Prompts are drawn within strata (those that occur in the same subsets), so that a subset keeps its size.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sarm.evaluate.rows import Benchmark, Observations, ScoredRow
from sarm.evaluate.statistics import Interval, wilson_interval

Floats = NDArray[np.float64]
# A combination of subsets with fewer prompts is drawn together with the other rare combinations.
_SMALLEST_STRATUM = 10
# Counts held in memory at once: 32 MB as float64.
_COUNTS_AT_ONCE = 4_000_000


class Sums:
    """Sums and counts of each part by cluster; `systems` sets of observations over the same prompts stand side by side."""

    def __init__(self, systems: Sequence[Observations]):
        names = sorted({cluster for one in systems for cluster in one.clusters})
        place = {name: i for i, name in enumerate(names)}
        self.parts = [list(dict.fromkeys(one.parts)) for one in systems]
        self.totals: list[tuple[Floats, Floats]] = []
        subsets: list[set[str]] = [set() for _ in names]
        for one, parts in zip(systems, self.parts, strict=True):
            column = {part: i for i, part in enumerate(parts)}
            sums, counts = np.zeros((len(names), len(parts))), np.zeros((len(names), len(parts)))
            at = ([place[cluster] for cluster in one.clusters], [column[part] for part in one.parts])
            np.add.at(sums, at, one.values)
            np.add.at(counts, at, 1.0)
            self.totals.append((sums, counts))
            for cluster, subset in zip(one.clusters, one.subsets, strict=True):
                subsets[place[cluster]].add(subset)
        keys = ["\x1f".join(sorted(found)) for found in subsets]
        sizes = Counter(keys)
        merged = ["" if "\x1f" in key and sizes[key] < _SMALLEST_STRATUM else key for key in keys]
        self.strata = [np.flatnonzero([key == own for own in merged]) for key in dict.fromkeys(merged)]
        self.num_clusters = len(names)

    def means(self, counts_RC: Floats, system: int) -> dict[str, Floats]:
        """Mean of every part in every resample; NaN where a resample holds none of its rows."""
        sums, counts = self.totals[system]
        with np.errstate(invalid="ignore", divide="ignore"):
            means_RP = (counts_RC @ sums) / (counts_RC @ counts)
        return dict(zip(self.parts[system], means_RP.T, strict=True))

    def clusters_of(self, figure: str) -> int:
        """How many prompts a figure rests on: those of its own parts, or all."""
        parts = self.parts[0]
        own = [i for i, part in enumerate(parts) if part == figure or part.startswith(f"{figure}/")]
        return int(self.totals[0][1][:, own].any(axis=1).sum()) if own else self.num_clusters


def resample(
    sums: Sums, figures: Callable[[Sequence[dict[str, Floats]]], dict[str, Any]], resamples: int, seed: int
) -> dict[str, Floats]:
    """Every figure in every resample; `figures` maps the means of all systems to figures."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    rows = max(1, _COUNTS_AT_ONCE // max(1, sums.num_clusters))
    for start in range(0, resamples, rows):
        num = min(rows, resamples - start)
        counts_RC = np.empty((num, sums.num_clusters))
        for stratum in sums.strata:
            size = len(stratum)
            drawn = rng.integers(size, size=(num, size)) + size * np.arange(num)[:, None]
            counts_RC[:, stratum] = np.bincount(drawn.ravel(), minlength=num * size).reshape(num, size)
        found.append(figures([sums.means(counts_RC, i) for i in range(len(sums.totals))]))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def percentile_interval(values_R: Floats, value: float, num_clusters: int) -> Interval:
    """95 % interval of a figure from its resamples.

    The percentiles are widened as much as a t interval is wider than a normal one of the population's variance
    (Hesterberg 2015), which few prompts need. Where the resamples do not differ, a share takes Wilson's interval.
    """
    finite = values_R[np.isfinite(values_R)]
    if not np.isfinite(value) or not len(finite):
        return Interval(float("nan"), float("nan"))
    if np.ptp(finite) < 1e-12:
        share = min(max(value, 0.0), 1.0)
        return wilson_interval(share * num_clusters, num_clusters)
    tail = 0.025
    if num_clusters > 1:
        widen = np.sqrt(num_clusters / (num_clusters - 1))
        tail = float(stats.norm.cdf(widen * stats.t.ppf(0.025, num_clusters - 1)))
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Interval(float(low), float(high))


def intervals(benchmark: Benchmark, rows: Sequence[ScoredRow], resamples: int, seed: int) -> dict[str, Interval]:
    """The 95 % interval of every figure of a benchmark."""
    if not rows:
        return {}
    sums = Sums([benchmark.observe(rows)])
    drawn = resample(sums, lambda means: benchmark.combine(means[0]), resamples, seed)
    values: Mapping[str, float] = benchmark.figures(rows)
    return {name: percentile_interval(drawn[name], values[name], sums.clusters_of(name)) for name in values}
