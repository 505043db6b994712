"""What a figure may owe to something other than quality: length, style, truncation, batching, an ill-set scale.

Rulers score a completion by its length alone. Length-controlled accuracy is sigmoid(a) of a logistic regression of "the
correct one wins" on the difference of lengths (a + b dlen), style-controlled also on the difference of markup counts:
what the model would get right on pairs of equal length (and style). Spearman is between reward and length within a prompt.
A function as reward model counts no tokens (NaN): what needs a length is then None, or left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float64
from numpy.typing import NDArray
from scipy import optimize

from sarm.contracts.ids import hash_share
from sarm.evaluate.benchmarks.benchmark import Benchmark
from sarm.evaluate.benchmarks.rows import PerCompletion, ScoredRow
from sarm.evaluate.statistics import Calibration, calibration

PerPair = Float64[NDArray[np.float64], " pairs"]
_RIDGE = 1e-3
_RANDOM_DRAWS = 20


@dataclass(frozen=True)
class Controlled:
    """Accuracies over all (correct, wrong) pairs, each row counting once. All but the plain one are None where lengths are unknown."""

    accuracy: float
    length_controlled_accuracy: float | None
    length_and_style_controlled_accuracy: float | None
    mean_spearman_reward_length: float | None
    """Of the prompts that have one; None where none has."""
    num_prompts_spearman: int


@dataclass(frozen=True)
class ScaledCalibration:
    """Calibration on one half of the prompts, as the margins are and divided by a temperature that was fitted on the other half."""

    num_pairs: int
    raw: Calibration
    temperature: float
    scaled: Calibration


@dataclass(frozen=True)
class Drift:
    """How far scores move when a completion is scored alone instead of in a batch."""

    num_completions: int
    max: float
    mean: float
    max_in_std: float | None
    """In standard deviations of all scores; None where these are equal."""


def rulers(benchmark: Benchmark, rows: Sequence[ScoredRow], seed: int) -> dict[str, dict[str, float]]:
    """The figures of choosing the longest and the shortest completion (none where lengths are unknown), and the mean figures of random scores."""
    rng = np.random.default_rng(seed)
    draws = [
        benchmark.figures([row._replace(scores=rng.normal(size=len(row.scores))) for row in rows])
        for _ in range(_RANDOM_DRAWS)
    ]
    known = has_lengths(rows)
    return {
        "longest": benchmark.figures([row._replace(scores=row.tokens) for row in rows]) if known else {},
        "shortest": benchmark.figures([row._replace(scores=-row.tokens) for row in rows]) if known else {},
        "random": {figure: float(np.mean([draw[figure] for draw in draws])) for figure in draws[0]},
    }


def has_lengths(rows: Sequence[ScoredRow]) -> bool:
    """Whether every completion's number of tokens is known."""
    return all(bool(np.isfinite(row.tokens).all()) for row in rows)


def length_and_style(rows: Sequence[ScoredRow]) -> Controlled:
    """Controlled accuracies, and the mean Spearman of reward and length within prompts."""
    won, lengths, styles, weights = [], [], [], []
    correlations, known = [], has_lengths(rows)
    for row in rows:
        n = row.num_correct
        margins = (row.scores[:n, None] - row.scores[None, n:]).ravel()
        won.append(np.where(margins > 0, 1.0, np.where(margins == 0, 0.5, 0.0)))
        lengths.append((np.log1p(row.tokens[:n, None]) - np.log1p(row.tokens[None, n:])).ravel())
        styles.append((np.log1p(row.markup[:n, None]) - np.log1p(row.markup[None, n:])).ravel())
        weights.append(np.full(len(margins), 1 / len(margins)))
        if known and len(row.scores) > 2 and np.ptp(row.scores) > 0 and np.ptp(row.tokens) > 0:
            correlations.append(float(np.corrcoef(_ranks(row.scores), _ranks(row.tokens))[0, 1]))
    y, length, style, weight = (np.concatenate(part) for part in (won, lengths, styles, weights))
    both = np.stack([length, style], 1)
    return Controlled(
        accuracy=float((y * weight).sum() / weight.sum()),
        length_controlled_accuracy=_accuracy_at_zero(y, length[:, None], weight) if known else None,
        length_and_style_controlled_accuracy=_accuracy_at_zero(y, both, weight) if known else None,
        mean_spearman_reward_length=float(np.mean(correlations)) if correlations else None,
        num_prompts_spearman=len(correlations),
    )


def _ranks(values_N: PerCompletion) -> PerCompletion:
    """Ranks from 1, equal values at their mean rank."""
    _, place, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _accuracy_at_zero(won_N: PerPair, x_ND: Float64[NDArray[np.float64], "pairs columns"], weight_N: PerPair) -> float:
    """sigmoid of the intercept of a logistic regression, with a ridge on the slopes so that separable data have a fit."""
    if np.ptp(won_N) == 0:
        return float(won_N[0])
    scale = x_ND.std(axis=0)
    x_ND = x_ND / np.where(scale > 0, scale, 1.0)

    def loss(beta: Float64[NDArray[np.float64], " coefficients"]) -> float:
        z = beta[0] + x_ND @ beta[1:]
        nll = won_N * np.logaddexp(0, -z) + (1 - won_N) * np.logaddexp(0, z)
        return float((weight_N * nll).sum() / weight_N.sum() + _RIDGE * (beta[1:] ** 2).sum() + 1e-6 * beta[0] ** 2)

    beta = optimize.minimize(loss, np.zeros(x_ND.shape[1] + 1), method="L-BFGS-B").x
    return float(1 / (1 + np.exp(-beta[0])))


def calibrated(rows: Sequence[ScoredRow]) -> ScaledCalibration | None:
    """NLL, Brier and ECE of sigmoid(margin / T) on one half of the prompts, at T = 1 and at the T fitted on the other half.

    The halves are fixed by the hash of the prompt. Pairs are (best correct, each wrong). None if a half is empty.
    """
    halves: tuple[list[PerPair], list[PerPair]] = ([], [])
    for row in rows:
        margins = row.scores[: row.num_correct].max() - row.scores[row.num_correct :]
        halves[hash_share(f"temperature/{row.cluster}") < 0.5].append(margins)
    if not all(halves):
        return None
    test, fit = (np.concatenate(half) for half in halves)
    temperature = fit_temperature(fit)
    return ScaledCalibration(len(test), calibration(test), temperature, calibration(test / temperature))


def fit_temperature(margins_N: PerPair) -> float:
    """The T > 0 with the least NLL of sigmoid(margin / T), within 0.001 and 1000 standard deviations of the margins."""
    scale = float(margins_N.std()) or 1.0
    found = optimize.minimize_scalar(
        lambda log_t: float(np.logaddexp(0, -margins_N / (scale * np.exp(log_t))).mean()),
        bounds=(np.log(1e-3), np.log(1e3)),
        method="bounded",
    )
    return float(scale * np.exp(found.x))


def drift(items: pa.Table) -> Drift | None:
    """Over completions with two finite scores; None if none has."""
    both = items.filter(pc.and_(pc.is_finite(items["score"]), pc.is_finite(items["score_alone"])))
    if not both.num_rows:
        return None
    gap = np.abs(both["score"].to_numpy() - both["score_alone"].to_numpy())
    spread = float(np.std(items.filter(pc.is_finite(items["score"]))["score"].to_numpy()))
    return Drift(both.num_rows, float(gap.max()), float(gap.mean()), float(gap.max() / spread) if spread else None)
