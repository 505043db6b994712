"""Intervals and calibration of pairwise accuracy. N pairs, C clusters (prompts), R resamples, B bins.

margin m = r_chosen - r_rejected    p = sigmoid(m)    credit = 1 if m > 0, 1/2 if m = 0, else 0
NLL = mean log(1 + e^-m)    Brier = mean (1 - p)^2    ECE = sum_b n_b/N |mean sigmoid(|m|) - mean credit|
Wilson: (q + z^2/2n +- z sqrt(q(1-q)/n + z^2/4n^2)) / (1 + z^2/n) with q = successes/n
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import NDArray

Z_95 = 1.959963984540054
NUM_BINS = 15
# Drawn cluster indices held in memory at once: 32 MB as int64.
DRAWS_AT_ONCE = 4_000_000


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


class Calibration(NamedTuple):
    """How well sigmoid(margin) states the chance that the chosen response wins; all in nats or shares, lower is better."""

    nll: float
    brier: float
    ece: float


class ReliabilityBins(NamedTuple):
    """Equal-mass bins by confidence: mean confidence, share won and number of pairs of each."""

    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    num_pairs: NDArray[np.int64]


def wilson_interval(successes: float | int, total: float | int) -> Interval:
    """95 % interval of a proportion; stays inside [0, 1] and keeps its width at 0 and at `total` successes.

    Raises ValueError unless 0 <= successes <= total and total > 0.
    """
    if not (total > 0 and 0 <= successes <= total):
        raise ValueError(f"expected 0 <= successes <= total and total > 0, got {successes} of {total}")
    share = successes / total
    centre = share + Z_95**2 / (2 * total)
    half = Z_95 * float(np.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2)))
    scale = 1 + Z_95**2 / total
    # Exact at the ends, where rounding would leave 1e-17 too much or too little.
    return Interval(
        0.0 if successes == 0 else (centre - half) / scale, 1.0 if successes == total else (centre + half) / scale
    )


def cluster_bootstrap(
    values_N: Float[np.ndarray, " pairs"], clusters_N: Shaped[np.ndarray, " pairs"], resamples: int, seed: int
) -> Interval:
    """95 % percentile interval of the mean of `values_N`, drawing whole clusters with replacement.

    The mean of a resample is a ratio of sums, so a cluster weighs as much as it has values. Where all clusters have
    the same mean the bootstrap has no spread and would claim certainty: a share in [0, 1] then gets the Wilson
    interval of that many clusters, any other number the point itself.

    Raises ValueError if there are no values, or ids and values differ in number.
    """
    if len(values_N) == 0 or len(values_N) != len(clusters_N):
        raise ValueError(f"expected as many cluster ids as values, and some, got {len(clusters_N)} and {len(values_N)}")
    _, cluster_N = np.unique(clusters_N, return_inverse=True)
    size_C = np.bincount(cluster_N)
    sum_C = np.bincount(cluster_N, weights=values_N.astype(np.float64))
    num_clusters = len(size_C)
    if np.ptp(sum_C / size_C) == 0:
        mean = float(sum_C.sum() / size_C.sum())
        return wilson_interval(mean * num_clusters, num_clusters) if 0 <= mean <= 1 else Interval(mean, mean)
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWS_AT_ONCE // num_clusters)
    means = []
    for start in range(0, resamples, rows):
        drawn_RC = rng.integers(num_clusters, size=(min(rows, resamples - start), num_clusters))
        means.append(sum_C[drawn_RC].sum(axis=1) / size_C[drawn_RC].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(low), float(high))


def pair_credit(margins_N: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
    """1 where the chosen response has the larger reward, 0.5 at an exact tie, 0 otherwise."""
    return np.where(margins_N > 0, 1.0, np.where(margins_N == 0, 0.5, 0.0))


def calibration(margins_N: Float[np.ndarray, " pairs"]) -> Calibration:
    """NLL (nats), Brier score and ECE of sigmoid(margin).

    Every margin is "chosen - rejected", so all labels are 1; the ECE is therefore taken of the side that the model
    bets on: its confidence sigmoid(|m|) against the credit it earns.

    Raises ValueError if there are no margins.
    """
    if len(margins_N) == 0:
        raise ValueError("calibration of no pairs is undefined")
    margins_N = margins_N.astype(np.float64)
    bins = reliability_bins(margins_N)
    gap_B = np.abs(bins.confidence - bins.accuracy)
    return Calibration(
        nll=float(np.logaddexp(0.0, -margins_N).mean()),
        brier=float(np.square(1 - _sigmoid(margins_N)).mean()),
        ece=float((bins.num_pairs * gap_B).sum() / len(margins_N)),
    )


def reliability_bins(margins_N: Float[np.ndarray, " pairs"]) -> ReliabilityBins:
    """At most 15 bins of (nearly) equally many pairs, from least to most confident; empty bins are left out."""
    confidence_N = _sigmoid(np.abs(margins_N.astype(np.float64)))
    credit_N = pair_credit(margins_N)
    # The second key makes the bins independent of row order where confidences are equal.
    order = np.lexsort((credit_N, confidence_N))
    parts = [part for part in np.array_split(order, NUM_BINS) if len(part)]
    return ReliabilityBins(
        np.array([confidence_N[part].mean() for part in parts]),
        np.array([credit_N[part].mean() for part in parts]),
        np.array([len(part) for part in parts], dtype=np.int64),
    )


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0.0, -x))


def bootstrap_means(
    values_NF: Float[np.ndarray, "pairs figures"], clusters_N: Shaped[np.ndarray, " pairs"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, " figures"], Float[np.ndarray, " figures"]]:
    """95 % percentile ends of the mean of every column, all columns of a resample over the same drawn clusters.

    Raises ValueError as `cluster_bootstrap`.
    """
    counts_RC, cluster_N = cluster_counts(clusters_N, resamples, seed)
    if len(values_NF) != len(cluster_N):
        raise ValueError(f"expected as many cluster ids as values, got {len(cluster_N)} and {len(values_NF)}")
    sums_CF = cluster_sums(values_NF, cluster_N)
    means_RF = (counts_RC @ sums_CF) / (counts_RC @ np.bincount(cluster_N))[:, None]
    low_F, high_F = np.quantile(means_RF, [0.025, 0.975], axis=0)
    return low_F, high_F


def cluster_counts(
    clusters_N: Shaped[np.ndarray, " pairs"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, "resamples clusters"], NDArray[np.intp]]:
    """How often each resample draws each cluster, and the cluster of each value; sums of resamples are then one product.

    Raises ValueError if there are no values.
    """
    if not len(clusters_N):
        raise ValueError("expected some values to resample")
    names, cluster_N = np.unique(clusters_N, return_inverse=True)
    probabilities = np.full(len(names), 1 / len(names))
    counts_RC = np.random.default_rng(seed).multinomial(len(names), probabilities, size=resamples)
    return counts_RC.astype(np.float64), cluster_N


def cluster_sums(
    values_NF: Float[np.ndarray, "pairs figures"], cluster_N: NDArray[np.intp]
) -> Float[np.ndarray, "clusters figures"]:
    """Column sums of each cluster's rows."""
    order = np.argsort(cluster_N, kind="stable")
    starts = np.flatnonzero(np.diff(cluster_N[order], prepend=-1))
    return np.add.reduceat(values_NF[order], starts, axis=0)
