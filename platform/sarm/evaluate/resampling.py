"""Bootstrap over prompts. C clusters, P parts (means a benchmark is made of), F figures, R resamples.

Every figure is a function of means over rows, Ties and RM-Bench included, so a resample of prompts is a vector of counts:
mean_p = sum_c count_c sum_cp / sum_c count_c n_cp, and the figures are combined from these means afresh in each resample.
Prompts are drawn within strata (those that occur in the same subsets), so that a subset keeps its size.

Intervals are BCa (Efron 1987), since a share near 0 or 1 is skewed: the percentiles of the resamples at
Phi(z0 + (z0 + z) / (1 - a (z0 + z))), z0 from the share of resamples below the figure, a from leaving out one prompt at a time.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

from sarm.data.statistics import Z_95, Interval, wilson_interval
from sarm.evaluate.rows import Benchmark, Observations, ScoredRow

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

    def differing(self, figure: str) -> int:
        """How many prompts give the first two systems different sums in the parts of a figure."""
        (a, _), (b, _) = self.totals[:2]
        own = self._own_parts(figure)
        return int((a[:, own] != b[:, own]).any(axis=1).sum())

    def _own_parts(self, figure: str) -> list[int]:
        parts = self.parts[0]
        own = [i for i, part in enumerate(parts) if part == figure or part.startswith(f"{figure}/")]
        return own or list(range(len(parts)))

    def clusters_of(self, figure: str) -> int:
        """How many prompts a figure rests on: those of its own parts, or all."""
        return int(self.totals[0][1][:, self._own_parts(figure)].any(axis=1).sum())


class Resamples(NamedTuple):
    """Every figure in every resample, and the acceleration of each figure."""

    values: dict[str, Floats]
    acceleration: dict[str, float]


def resample(
    sums: Sums, figures: Callable[[Sequence[dict[str, Floats]]], dict[str, Any]], resamples: int, seed: int
) -> Resamples:
    """Figures of resampled prompts; `figures` maps the means of all systems to figures."""
    rng = np.random.default_rng(seed)

    def of(counts_RC: Floats) -> dict[str, Any]:
        return figures([sums.means(counts_RC, i) for i in range(len(sums.totals))])

    def drawn(num: int) -> Floats:
        counts_RC = np.empty((num, sums.num_clusters))
        for stratum in sums.strata:
            size = len(stratum)
            picks = rng.integers(size, size=(num, size)) + size * np.arange(num)[:, None]
            counts_RC[:, stratum] = np.bincount(picks.ravel(), minlength=num * size).reshape(num, size)
        return counts_RC

    rows = max(1, _COUNTS_AT_ONCE // max(1, sums.num_clusters))
    found = [of(drawn(min(rows, resamples - start))) for start in range(0, resamples, rows)]
    left_out = of(1.0 - np.eye(sums.num_clusters))
    return Resamples(
        {name: np.concatenate([part[name] for part in found]) for name in found[0]},
        {name: _acceleration(values, sums.strata) for name, values in left_out.items()},
    )


def _acceleration(left_out_C: Floats, strata: Sequence[NDArray[np.intp]]) -> float:
    """Skewness of the prompts' influence on a figure, a sixth of it; each stratum about its own mean."""
    influence = [(left_out_C[s].mean() - left_out_C[s]) * (len(s) - 1) / len(s) for s in strata]
    all_C = np.concatenate(influence)
    all_C = all_C[np.isfinite(all_C)]
    spread = float((all_C**2).sum()) ** 1.5
    return float((all_C**3).sum() / (6 * spread)) if spread > 1e-30 else 0.0


def interval(values_R: Floats, value: float, num_clusters: int, acceleration: float | None) -> Interval:
    """95 % interval of a figure from its resamples: BCa, or of plain percentiles where `acceleration` is None.

    The tails are moved out as much as a t interval is wider than a normal one of the population's variance (Hesterberg
    2015), which few prompts need. Where the resamples do not differ, a share takes Wilson's interval.
    """
    finite = values_R[np.isfinite(values_R)]
    if not np.isfinite(value) or not len(finite):
        return Interval(float("nan"), float("nan"))
    if np.ptp(finite) < 1e-12:
        share = min(max(value, 0.0), 1.0)
        return wilson_interval(share * num_clusters, num_clusters)
    z = Z_95
    if num_clusters > 1:
        z = float(-np.sqrt(num_clusters / (num_clusters - 1)) * special.stdtrit(num_clusters - 1, 0.025))
    if acceleration is None:
        low, high = np.quantile(finite, special.ndtr([-z, z]))
        return Interval(float(low), float(high))
    # Shares come in steps: a resample that equals the figure (but for rounding) counts half.
    below = np.mean(finite < value - 1e-12) + 0.5 * np.mean(np.abs(finite - value) <= 1e-12)
    z0 = float(special.ndtri(np.clip(below, 0.5 / len(finite), 1 - 0.5 / len(finite))))
    tails = [float(special.ndtr(z0 + (z0 + end) / (1 - acceleration * (z0 + end)))) for end in (-z, z)]
    low, high = np.quantile(finite, np.clip(tails, 0.0, 1.0))
    return Interval(float(low), float(high))


def intervals(benchmark: Benchmark, rows: Sequence[ScoredRow], resamples: int, seed: int) -> dict[str, Interval]:
    """The 95 % interval of every figure of a benchmark."""
    if not rows:
        return {}
    sums = Sums([benchmark.observe(rows)])
    drawn = resample(sums, lambda means: benchmark.combine(means[0]), resamples, seed)
    values: Mapping[str, float] = benchmark.figures(rows)
    return {
        name: interval(drawn.values[name], values[name], sums.clusters_of(name), drawn.acceleration[name])
        for name in values
    }
