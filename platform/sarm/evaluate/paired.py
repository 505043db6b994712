"""Two models on the same rows: is the difference real?

McNemar (exact): of the rows that only one of the two gets right, b for A and c for B, the chance of a split at least as
uneven if both were equally likely. Paired bootstrap: both models on the same resampled prompts, figures recomputed, percentiles (BCa is erratic where few prompts differ). Holm:
p-values sorted, the i-th of m times m - i + 1, so that over all subsets a false difference is claimed 5 % of the time at most.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm.data.statistics import wilson_interval
from sarm.evaluate.resampling import Sums, interval, resample
from sarm.evaluate.reward_bench_2 import TIES, best_of_n_credit
from sarm.evaluate.rows import Benchmark, ScoredRow

# Even if all of so few prompts favour one model, an exact test finds nothing at 5 %: 2 * 0.5 ** 5 is 0.0625.
_TOO_FEW = 5


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of `only_a` rows that A alone gets right against `only_b` that B alone does."""
    total = only_a + only_b
    tail = sum(math.comb(total, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values in the order given."""
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def compare(
    benchmark: Benchmark, rows_a: Sequence[ScoredRow], rows_b: Sequence[ScoredRow], resamples: int, seed: int
) -> dict[str, Any]:
    """Every figure of A, of B and of A - B with its interval, and McNemar by subset with Holm's adjustment.

    Rows are joined by subset and id; those of one model only are counted in `num_unmatched`.
    """
    by_key = {(row.subset, row.row_id): row for row in rows_b}
    pairs = [(row, by_key[key]) for row in rows_a if (key := (row.subset, row.row_id)) in by_key]
    counts = {"num_rows": len(pairs), "num_unmatched": len(rows_a) + len(rows_b) - 2 * len(pairs)}
    if not pairs:
        return {**counts, "figures": {}, "subsets": {}, "note": "no row was scored in both runs"}
    both = [list(rows) for rows in zip(*pairs, strict=True)]
    sums = Sums([benchmark.observe(rows) for rows in both])

    def differences(means: Sequence[dict[str, Any]]) -> dict[str, Any]:
        of_a, of_b = (benchmark.combine(one) for one in means)
        return {name: of_a[name] - of_b[name] for name in of_a}

    drawn = resample(sums, differences, resamples, seed)
    of_a, of_b = (benchmark.figures(rows) for rows in both)
    figures = {}
    for name in of_a:
        gain, values = of_a[name] - of_b[name], drawn.values[name][np.isfinite(drawn.values[name])]
        num_differ, num = sums.differing(name), sums.clusters_of(name)
        low, high = interval(values, gain, num, None) if num_differ else (gain, gain)
        if num_differ <= _TOO_FEW:
            # What the prompts seen could not show is bounded by how often an unseen one could differ.
            unseen = wilson_interval(0, num).high
            low, high = min(low, gain - unseen), max(high, gain + unseen)
        figures[name] = {
            "a": of_a[name],
            "b": of_b[name],
            "difference": gain,
            "difference_ci95": [low, high],
            "num_differing_prompts": num_differ,
            "p_bootstrap": float(min(1.0, 2 * min(_share(values <= 0), _share(values >= 0)))) if num_differ else None,
        }
    return {**counts, "figures": figures, "subsets": _subsets(pairs)}


def is_right(row: ScoredRow) -> bool:
    """Whether a row counts as right where right and wrong is all there is.

    One correct completion: it alone scores highest. Ties: every correct one scores above every wrong one. Otherwise
    (RM-Bench): more than half of the comparisons of a correct with a wrong completion are won.
    """
    if row.subset != TIES and row.num_correct == 1:
        return best_of_n_credit(row.scores) == 1.0
    won = row.scores[: row.num_correct, None] > row.scores[None, row.num_correct :]
    return bool(won.all() if row.subset == TIES else won.mean() > 0.5)


def _subsets(pairs: Sequence[tuple[ScoredRow, ScoredRow]]) -> dict[str, Any]:
    outcomes: dict[str, list[tuple[bool, bool]]] = {}
    for a, b in pairs:
        outcomes.setdefault(a.subset, []).append((is_right(a), is_right(b)))
    found = {
        subset: {
            "num_rows": len(own),
            "only_a": sum(a and not b for a, b in own),
            "only_b": sum(b and not a for a, b in own),
        }
        for subset, own in outcomes.items()
    }
    p_values = {subset: mcnemar(one["only_a"], one["only_b"]) for subset, one in found.items()}
    adjusted = holm(p_values)
    return {subset: {**one, "p_mcnemar": p_values[subset], "p_holm": adjusted[subset]} for subset, one in found.items()}


def _share(values: Any) -> float:
    # One more than counted: a bootstrap of R resamples cannot show a chance below 1 / (R + 1).
    return float((np.count_nonzero(values) + 1) / (len(values) + 1))
