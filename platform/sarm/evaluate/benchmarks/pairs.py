"""Own preferences: pairs of a chosen and a rejected answer, in any layout that training takes.

Every (correct, wrong) pair of a row counts 1, 1/2 at an equal score, or 0; a row's pairs are averaged.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sarm.data.sources.layouts import parse_pair
from sarm.evaluate.benchmarks.benchmark import Benchmark, Parsed
from sarm.evaluate.benchmarks.fields import Fault
from sarm.evaluate.benchmarks.rows import Observations, ScoredRow, collect
from sarm.evaluate.statistics import pair_credit


def parse(fields: Mapping[str, Any]) -> Parsed:
    """chosen, rejected (texts with a prompt, or conversations that share one), subset."""
    pair = parse_pair(fields, "")
    if isinstance(pair, str):
        raise Fault(pair)
    return Parsed(pair.prompt, [pair.chosen], [pair.rejected], pair.subset or "")


def observe(rows: Sequence[ScoredRow]) -> Observations:
    """The credit of each row, overall and for its subset."""
    return collect(credits_of(rows))


def credits_of(rows: Sequence[ScoredRow]) -> Iterator[tuple[str, ScoredRow, float]]:
    """(part, row, credit) of each row, overall and for its subset."""
    for row in rows:
        margins = (row.scores[: row.num_correct, None] - row.scores[None, row.num_correct :]).ravel()
        credit = float(pair_credit(margins).mean())
        yield "overall", row, credit
        if row.subset:
            yield row.subset, row, credit


PAIRS = Benchmark(name="pairs", title="Own pairs", prefix="pairs", parse=parse, observe=observe)
