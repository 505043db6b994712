"""95 % intervals of means over pairs whose prompts are few and unequal: of shares, of paired differences, and of any numbers.

N pairs, C prompts (clusters) of n_c pairs, m = sum n_c^2 / N: the size of the prompt that a pair is in. What is estimated is the mean over
pairs, so a prompt weighs as much as it has pairs. So many prompts of one size would say as much: C_eff = N / m (Kish).

variance    w V_model + (1 - w) V_robust, w = 5 / (5 + df)
            V_model  = s^2 (1 + (m - 1) icc) / N: one intraclass correlation from the variance within and over prompts (Fleiss and Cuzick 1979 for shares)
            V_robust = sum_c (sum of c - n_c mean)^2 / N^2 / K, K its bias where the correlation is `icc` (Bell and McCaffrey 2002, one factor)
            V_model is steady but wrong where a prompt's accuracy goes with its size; V_robust is right with many prompts and too small with few
df          (sum o_c)^2 / sum o_c^2 - 1, o_c = 1 + (n_c - 1) icc: C - 1 where pairs of a prompt are independent, C_eff - 1 where they agree
share       Wilson's interval of n_eff = s^2 / variance pairs with Student's t of df
difference  mean -+ t sqrt(variance + 2 / (n_eff + 2)^2): one more pair for either side (Bonett and Price 2012)
mean        mean -+ t sqrt(variance)

How often they hold the truth is measured by tests/bench/bench_coverage.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from scipy import special

Z_95 = 1.959963984540054
# What the variance under one correlation counts beside that from the prompts themselves, in degrees of freedom.
_PRIOR_DF = 5.0
# Values that are equal but for rounding do not vary.
_NO_SPREAD = 1e-12
# Where none of 20 prompts differs, at most one in seven of all may (1 - 0.05^(1/20); the rule of three says 3 / 20): fewer say nothing of the others.
_FEWEST_FLAT = 20
# Few prompts, or nearly all pairs right, show too little of the correlation: it is raised by this over 1 + the effective prompts that could differ.
_ICC_RAISE = 2.0


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval over prompts, both in the unit of what is averaged; the interval is NaN where none can be given."""

    value: float
    ci95: Interval


class _Clustered(NamedTuple):
    """A mean of clustered values: variance of the values, of their mean, and what the latter rests on."""

    mean: float
    value_variance: float
    variance: float
    df: float
    effective_clusters: float
    is_flat: bool


def share_interval(values_N: Float[np.ndarray, " pairs"], clusters_N: Shaped[np.ndarray, " ids"]) -> Interval:
    """Of the mean of values in [0, 1], such as an accuracy: inside [0, 1], and with Wilson's width at none and at all.

    Where all values are equal, or there is one cluster, nothing says how alike pairs of a cluster are: they then count as one.

    Raises ValueError if there are no values, ids and values differ in number, or a value is outside [0, 1].
    """
    if len(values_N) and not 0 <= np.min(values_N) <= np.max(values_N) <= 1:
        raise ValueError(f"expected values in [0, 1], got {np.min(values_N)} to {np.max(values_N)}")
    found = _clustered(values_N, clusters_N, bounded=True)
    if found.is_flat:
        return effective_wilson(found.mean, found.effective_clusters, np.inf)
    binary = found.mean * (1 - found.mean)
    spread = float(np.mean(np.square(values_N - found.mean)))
    largest = len(values_N) * binary / spread
    size = float(len(values_N) / found.effective_clusters)
    # Shares of right and wrong say their own variance: only the part that agreement within clusters adds is estimated.
    is_binary = bool(np.isin(values_N, (0.0, 1.0)).all())
    known = np.inf if size <= 1 else size / (size - 1)
    effective = min(binary * found.value_variance / spread / found.variance, largest)
    return effective_wilson(found.mean, effective, found.df * (known if is_binary else 1.0))


def difference_interval(values_N: Float[np.ndarray, " pairs"], clusters_N: Shaped[np.ndarray, " ids"]) -> Interval:
    """Of the mean of paired differences in [-1, 1], such as accuracy of A minus accuracy of B on the same pairs.

    Where no value differs from another, or there is one cluster: as far from the mean as prompts that were not seen could still take it, and 0
    is left out only if that many prompts on one side are no chance.

    Raises ValueError if there are no values, ids and values differ in number, or a value is outside [-1, 1].
    """
    if len(values_N) and not -1 <= np.min(values_N) <= np.max(values_N) <= 1:
        raise ValueError(f"expected values in [-1, 1], got {np.min(values_N)} to {np.max(values_N)}")
    found = _clustered(values_N, clusters_N, bounded=True)
    if found.is_flat:
        return flat_difference(found.mean, found.effective_clusters, len(np.unique(clusters_N)))
    return effective_difference(found.mean, found.variance, found.value_variance / found.variance, found.df)


def mean_interval(values_N: Float[np.ndarray, " pairs"], clusters_N: Shaped[np.ndarray, " ids"]) -> Interval:
    """Of the mean of any numbers, such as shifts of margins.

    NaN where there is one cluster, or fewer than 20 effective ones and no value differs from another: nothing then says how far others would be off.

    Raises ValueError if there are no values, or ids and values differ in number.
    """
    found = _clustered(values_N, clusters_N, bounded=False)
    if found.effective_clusters <= 1 or (found.is_flat and found.effective_clusters < _FEWEST_FLAT):
        return Interval(float("nan"), float("nan"))
    half = 0.0 if found.is_flat else student(found.df) * float(np.sqrt(found.variance))
    return Interval(found.mean - half, found.mean + half)


def estimated(
    values_N: Float[np.ndarray, " pairs"],
    clusters_N: Shaped[np.ndarray, " ids"],
    interval: Callable[..., Interval] = mean_interval,
) -> Estimate:
    """The mean of the values with its interval. Raises as `interval`."""
    return Estimate(float(values_N.mean()), interval(values_N, clusters_N))


def wilson_interval(successes: float | int, total: float | int) -> Interval:
    """95 % interval of a proportion of independent cases; stays inside [0, 1] and keeps its width at 0 and at `total` successes.

    Raises ValueError unless 0 <= successes <= total and total > 0.
    """
    if not (total > 0 and 0 <= successes <= total):
        raise ValueError(f"expected 0 <= successes <= total and total > 0, got {successes} of {total}")
    return effective_wilson(successes / total, total, np.inf)


def effective_wilson(share: float, total: float, df: float) -> Interval:
    """Wilson's interval of a share of `total` cases, with the quantile of Student's t of `df` in place of the normal one."""
    quantile = student(df)
    centre = share + quantile**2 / (2 * total)
    half = quantile * float(np.sqrt(share * (1 - share) / total + quantile**2 / (4 * total**2)))
    scale = 1 + quantile**2 / total
    # Exact at the ends, where rounding would leave 1e-17 too much or too little.
    low = 0.0 if share == 0 else max(0.0, (centre - half) / scale)
    return Interval(low, 1.0 if share == 1 else min(1.0, (centre + half) / scale))


def effective_difference(mean: float, variance: float, total: float, df: float) -> Interval:
    """Bonett and Price's interval of a paired difference, for `total` effective pairs and the quantile of Student's t of `df`."""
    half = student(df) * float(np.sqrt(variance + 2 / (total + 2) ** 2))
    return Interval(max(-1.0, mean - half), min(1.0, mean + half))


def flat_difference(mean: float, total: float, num_prompts: int) -> Interval:
    """Around a difference that all of `total` effective prompts share: Wilson's bound on how often a prompt could have differed from it.

    It holds 0 where the `num_prompts` that take a side could by chance have taken the same one.
    """
    unseen = effective_wilson(0.0, total, np.inf).high
    low, high = max(-1.0, mean - unseen), min(1.0, mean + unseen)
    return Interval(min(low, 0.0), max(high, 0.0)) if could_be_chance(num_prompts) else Interval(low, high)


def could_be_chance(num_prompts: int) -> bool:
    """Whether so many prompts fall on one side of 0 by chance in more than 5 % of cases: up to five do, two-sided."""
    return 2.0 ** (1 - num_prompts) > 0.05


def student(df: float) -> float:
    """The 97.5 % quantile of Student's t, of one degree of freedom at least."""
    return Z_95 if np.isinf(df) else float(special.stdtrit(max(df, 1.0), 0.975))


def _clustered(
    values_N: Float[np.ndarray, " pairs"], clusters_N: Shaped[np.ndarray, " ids"], bounded: bool
) -> _Clustered:
    """Mean and variances; `bounded` values are at most 1 in size, so that a small variance means that few of them differ.

    Raises ValueError if there are no values, or ids and values differ in number.
    """
    if len(values_N) == 0 or len(values_N) != len(clusters_N):
        raise ValueError(f"expected as many cluster ids as values, and some, got {len(clusters_N)} and {len(values_N)}")
    values_N = np.asarray(values_N, dtype=np.float64)
    _, cluster_N = np.unique(clusters_N, return_inverse=True)
    size_C = np.bincount(cluster_N).astype(np.float64)
    sum_C = np.bincount(cluster_N, weights=values_N)
    num, num_clusters = len(values_N), len(size_C)
    mean = float(sum_C.sum() / num)
    own_size = float(np.square(size_C).sum() / num)
    clusters = num / own_size
    if num_clusters == 1 or np.ptp(values_N) <= _NO_SPREAD * np.abs(values_N).max():
        return _Clustered(
            mean=mean, value_variance=0.0, variance=0.0, df=1.0, effective_clusters=clusters, is_flat=True
        )
    spread = float(np.square(values_N - mean).mean())
    within = float(np.square(values_N - (sum_C / size_C)[cluster_N]).sum() / max(num - num_clusters, 1))
    # E spread = s^2 - V_model and E within = s^2 (1 - icc), solved for s^2: neither alone is unbiased with few clusters.
    value_variance = max((spread - within * (own_size - 1) / num) / (1 - own_size / num), spread)
    icc = min(max(1 - within / value_variance, 0.0), 1.0)
    differing = min(1.0, 4 * spread) if bounded else 1.0
    icc = min(1.0, icc * (1 + _ICC_RAISE / (1 + clusters * differing)))
    effect_C = 1 + (size_C - 1) * icc
    df = float(effect_C.sum() ** 2 / np.square(effect_C).sum() - 1)
    share_C = size_C / num
    omega_C = size_C * effect_C
    bias = float((omega_C * (1 - 2 * share_C)).sum() / omega_C.sum() + np.square(share_C).sum())
    robust = float(np.square(sum_C - size_C * mean).sum() / num**2 / bias)
    model = value_variance * (1 + (own_size - 1) * icc) / num
    weight = _PRIOR_DF / (_PRIOR_DF + df * differing)
    return _Clustered(
        mean=mean,
        value_variance=value_variance,
        variance=weight * model + (1 - weight) * robust,
        df=df,
        effective_clusters=clusters,
        is_flat=False,
    )
