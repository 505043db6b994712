"""Calibration of pairwise accuracy, and tests by prompt. N pairs, C clusters (prompts), F figures, P sign flips, B bins.

margin m = r_chosen - r_rejected    p = sigmoid(m)    credit = 1 if m > 0, 1/2 if m = 0, else 0
NLL = mean log(1 + e^-m)    Brier = mean (1 - p)^2    ECE = sum_b n_b/N |mean sigmoid(|m|) - mean credit|
sign flips: p = share of signs e in {-1, 1}^C with |sum_c e_c t_c| >= |sum_c t_c|
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from numpy.typing import NDArray

NUM_BINS = 15
# 2 ** 12 sign flips are fewer than the least number that is drawn by default.
EXACT_CLUSTERS = 12
_FLIPS_AT_ONCE = 500


@dataclass(frozen=True)
class Calibration:
    """How well sigmoid(margin) states the chance that the chosen response wins; all in nats or shares, lower is better."""

    nll: float
    brier: float
    ece: float


class ReliabilityBins(NamedTuple):
    """Equal-mass bins by confidence: mean confidence, share won and number of pairs of each."""

    confidence: Float64[NDArray[np.float64], " bins"]
    accuracy: Float64[NDArray[np.float64], " bins"]
    num_pairs: Int64[NDArray[np.int64], " bins"]


def pair_credit(margins_N: Float[np.ndarray, "*pairs"]) -> Float[np.ndarray, "*pairs"]:
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


def _sigmoid(x: Float64[NDArray[np.float64], " pairs"]) -> Float64[NDArray[np.float64], " pairs"]:
    return np.exp(-np.logaddexp(0.0, -x))


def cluster_sums(
    values_NF: Float[np.ndarray, "pairs figures"], cluster_N: Int[NDArray[np.intp], " pairs"]
) -> Float[np.ndarray, "clusters figures"]:
    """Column sums of each cluster's rows."""
    order = np.argsort(cluster_N, kind="stable")
    starts = np.flatnonzero(np.diff(cluster_N[order], prepend=-1))
    return np.add.reduceat(values_NF[order], starts, axis=0)


def sign_flip_p_values(
    terms_CF: Float[np.ndarray, "clusters figures"], permutations: int, seed: int
) -> Float[np.ndarray, " figures"]:
    """Two-sided p-value of every column's sum, were the sign of each cluster's terms chance.

    All 2^C signs are tried where at most 12 clusters have a term that is not 0, else `permutations` random ones, with p = (b + 1) / (P + 1)
    (Phipson and Smyth 2010). Clusters of zeros change no sum and do not count. 1 where all terms are 0.

    Raises ValueError if a term is not finite: no sum would be as large as NaN, and p the smallest there is.
    """
    if not np.isfinite(terms_CF).all():
        raise ValueError(f"expected finite terms, got {np.count_nonzero(~np.isfinite(terms_CF))} that are not")
    terms_CF = terms_CF[np.any(terms_CF != 0, axis=1)]
    # Sums that are equal but for rounding are as large.
    least_F = np.abs(terms_CF.sum(axis=0)) - 1e-9 * np.abs(terms_CF).sum(axis=0)
    num = len(terms_CF)
    if num <= EXACT_CLUSTERS:
        signs_PC = np.array(list(itertools.product((-1.0, 1.0), repeat=num)))
        return np.asarray((np.abs(signs_PC @ terms_CF) >= least_F).mean(axis=0))
    rng = np.random.default_rng(seed)
    as_large_F = np.zeros(terms_CF.shape[1])
    for start in range(0, permutations, _FLIPS_AT_ONCE):
        signs_PC = rng.choice((-1.0, 1.0), size=(min(_FLIPS_AT_ONCE, permutations - start), num))
        as_large_F += (np.abs(signs_PC @ terms_CF) >= least_F).sum(axis=0)
    return (as_large_F + 1) / (permutations + 1)
