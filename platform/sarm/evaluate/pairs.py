"""Pairwise accuracy of a PAIR_SCORES table, and of rules that never read the text. N pairs.

margin m = r_chosen - r_rejected    accuracy = mean credit(m)    intervals are over prompts, since one prompt's pairs depend on each other
shorter-answer rule: m = tokens_rejected - tokens_chosen    longer-answer rule: its negative
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Shaped
from numpy.typing import NDArray

from sarm.contracts.figures import OPTIONAL, SPREAD
from sarm.evaluate.intervals import Interval, difference_interval, share_interval
from sarm.evaluate.statistics import Calibration, calibration, pair_credit
from sarm.settings.checks import UserError


@dataclass(frozen=True, kw_only=True)
class PairFigures:
    """Accuracy on some pairs, as a share, with its interval over prompts. Rewards and margins are in the model's own unit (logits).

    None is what does not apply: a `note` says why where no pair is left to measure on, and a rule has no rewards.
    """

    num_pairs: int
    num_prompts: int
    note: str | None = field(default=None, metadata=OPTIONAL)
    accuracy: float | None = field(default=None, metadata=OPTIONAL)
    accuracy_ci95: Interval | None = field(default=None, metadata=OPTIONAL)
    ties: int | None = field(default=None, metadata=OPTIONAL)
    num_nonfinite: int | None = field(default=None, metadata=OPTIONAL)
    """Pairs left out because a reward is not finite."""
    mean_margin: float | None = field(default=None, metadata=OPTIONAL)
    calibration: Calibration | None = field(default=None, metadata=SPREAD)
    chosen_reward_mean: float | None = field(default=None, metadata=OPTIONAL)
    chosen_reward_std: float | None = field(default=None, metadata=OPTIONAL)
    rejected_reward_mean: float | None = field(default=None, metadata=OPTIONAL)
    rejected_reward_std: float | None = field(default=None, metadata=OPTIONAL)
    by_subset: "dict[str, PairFigures] | None" = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class DifferenceFigures:
    """Accuracy of one model minus that of another, as a share, with the interval of the paired difference over prompts."""

    num_pairs: int
    num_prompts: int
    num_unmatched: int
    """Pairs of one table only."""
    num_nonfinite: int
    note: str | None = field(default=None, metadata=OPTIONAL)
    """Why there is no difference."""
    difference: float | None = field(default=None, metadata=OPTIONAL)
    difference_ci95: Interval | None = field(default=None, metadata=OPTIONAL)


def measure_pairs(scores: pa.Table) -> PairFigures:
    """Accuracy with its interval, calibration and reward distribution, overall and under `by_subset`.

    Pairs with a reward that is not finite are counted in `num_nonfinite` and left out of everything else. Where no
    pair is left there is a `note` in place of the measures.
    """

    def measure(part: pa.Table) -> PairFigures:
        chosen_N, rejected_N = _rewards(part)
        finite = np.isfinite(chosen_N) & np.isfinite(rejected_N)
        chosen_N, rejected_N = chosen_N[finite], rejected_N[finite]
        margins_N = chosen_N - rejected_N
        measured = _accuracy(margins_N, _ids(part, "prompt_id")[finite])
        measured = replace(measured, num_nonfinite=int((~finite).sum()))
        if not len(margins_N):
            return measured
        return replace(
            measured,
            mean_margin=float(margins_N.mean()),
            calibration=calibration(margins_N),
            chosen_reward_mean=float(chosen_N.mean()),
            chosen_reward_std=float(chosen_N.std()),
            rejected_reward_mean=float(rejected_N.mean()),
            rejected_reward_std=float(rejected_N.std()),
        )

    return _with_subsets(scores, measure)


def length_baseline(scores: pa.Table) -> dict[str, PairFigures]:
    """What choosing the `shorter` or the `longer` response (in tokens, equal lengths count half) would score."""

    def rule(sign: int) -> Callable[[pa.Table], PairFigures]:
        def measure(part: pa.Table) -> PairFigures:
            extra_N = _numbers(part, "rejected_tokens") - _numbers(part, "chosen_tokens")
            return _accuracy(sign * extra_N, _ids(part, "prompt_id"))

        return measure

    return {"shorter": _with_subsets(scores, rule(1)), "longer": _with_subsets(scores, rule(-1))}


def random_baseline(scores: pa.Table, seed: int) -> PairFigures:
    """What a normal random reward per response would score; depends on the seed and the set of pair ids alone."""
    ids_N = _ids(scores, "pair_id")
    margins_N = np.empty(len(ids_N))
    draws_N2 = np.random.default_rng(seed).normal(size=(len(ids_N), 2))
    margins_N[np.argsort(ids_N)] = draws_N2[:, 0] - draws_N2[:, 1]
    return _accuracy(margins_N, _ids(scores, "prompt_id"))


def accuracy_difference(scores_a: pa.Table, scores_b: pa.Table) -> DifferenceFigures:
    """Accuracy of a minus accuracy of b on the pairs that both scored, with the interval of the paired difference.

    Pairs are joined by `pair_id`; those of one table only are counted in `num_unmatched`, those with a reward that
    is not finite in either table in `num_nonfinite`.

    Raises UserError if a table has a pair twice.
    """
    rows_a, rows_b = _unique_rows(scores_a), _unique_rows(scores_b)
    common, index_a, index_b = np.intersect1d(rows_a, rows_b, assume_unique=True, return_indices=True)
    margins_a, margins_b = _margins(scores_a)[index_a], _margins(scores_b)[index_b]
    finite = np.isfinite(margins_a) & np.isfinite(margins_b)
    prompts_N = _ids(scores_a, "prompt_id")[index_a][finite]
    gain_N = pair_credit(margins_a[finite]) - pair_credit(margins_b[finite])
    counted = DifferenceFigures(
        num_pairs=len(gain_N),
        num_prompts=len(np.unique(prompts_N)),
        num_unmatched=len(rows_a) + len(rows_b) - 2 * len(common),
        num_nonfinite=int((~finite).sum()),
    )
    if not len(gain_N):
        return replace(counted, note="no pair with finite rewards in both tables")
    interval = difference_interval(gain_N, prompts_N)
    return replace(counted, difference=float(gain_N.mean()), difference_ci95=interval)


def _accuracy(
    margins_N: Float64[NDArray[np.float64], " pairs"], prompts_N: Shaped[NDArray[Any], " pairs"]
) -> PairFigures:
    counted = PairFigures(num_pairs=len(margins_N), num_prompts=len(np.unique(prompts_N)))
    if not len(margins_N):
        return replace(counted, note="no pair with finite rewards")
    credit_N = pair_credit(margins_N)
    return replace(
        counted,
        accuracy=float(credit_N.mean()),
        accuracy_ci95=share_interval(credit_N, prompts_N),
        ties=int((margins_N == 0).sum()),
    )


def _with_subsets(scores: pa.Table, measure: Callable[[pa.Table], PairFigures]) -> PairFigures:
    """Pairs without a subset count overall and make no subset of their own."""
    subset_N = np.array(scores["subset"].to_pylist(), dtype=object)
    names = sorted({name for name in subset_N if name is not None})
    by_subset = {name: measure(scores.filter(pa.array(subset_N == name))) for name in names}
    return replace(measure(scores), by_subset=by_subset)


def _unique_rows(scores: pa.Table) -> Shaped[NDArray[Any], " pairs"]:
    ids_N = _ids(scores, "pair_id")
    if len(np.unique(ids_N)) != len(ids_N):
        raise UserError("a table of pair scores has a pair_id twice. Score the pairs again into an empty folder.")
    return ids_N


def _rewards(scores: pa.Table) -> tuple[Float64[NDArray[np.float64], " pairs"], Float64[NDArray[np.float64], " pairs"]]:
    return _numbers(scores, "chosen_reward"), _numbers(scores, "rejected_reward")


def _margins(scores: pa.Table) -> Float64[NDArray[np.float64], " pairs"]:
    chosen_N, rejected_N = _rewards(scores)
    # inf - inf is a NaN that the caller counts, not a surprise worth a warning.
    with np.errstate(invalid="ignore"):
        return chosen_N - rejected_N


def _numbers(scores: pa.Table, column: str) -> Float64[NDArray[np.float64], " pairs"]:
    numbers_N: NDArray[np.float64] = scores[column].to_numpy().astype(np.float64)
    return numbers_N


def _ids(scores: pa.Table, column: str) -> Shaped[NDArray[Any], " pairs"]:
    return np.array(scores[column].to_pylist(), dtype=str)
