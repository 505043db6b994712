"""Own preferences: pairs of a chosen and a rejected answer, in any layout that training takes.

Every (correct, wrong) pair of a row counts 1, 1/2 at an equal score, or 0; a row's pairs are averaged.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sarm.data.sources.layouts.registry import parse_pairs
from sarm.evaluate.benchmarks.benchmark import Benchmark, Parsed
from sarm.evaluate.benchmarks.fields import Fault
from sarm.evaluate.benchmarks.rows import Observations, ScoredRow, collect
from sarm.evaluate.statistics import pair_credit


def parse(fields: Mapping[str, Any]) -> Parsed:
    """A row in any of the layouts of training, subset. Of several answers each correct one has to be compared with each wrong one."""
    pairs = parse_pairs(fields, "")
    if isinstance(pairs, str):
        raise Fault(pairs)
    chosen, rejected = (
        list(dict.fromkeys(texts)) for texts in zip(*((pair.chosen, pair.rejected) for pair in pairs), strict=True)
    )
    if len(pairs) != len(chosen) * len(rejected) or not set(chosen).isdisjoint(rejected):
        raise Fault("ranked_answers")
    return Parsed(pairs[0].prompt, chosen, rejected, pairs[0].subset or "")


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
