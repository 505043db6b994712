"""A benchmark's rows in their official fields, as rows of one prompt with its correct and wrong completions.

A row that cannot be scored is a `BadRow` with its place and reason, never a silent gap.
"""

from collections.abc import Callable, Iterable

from sarm.contracts.ids import prompt_id_of
from sarm.data.sources.conversations import fault_of_content
from sarm.data.sources.rows import Reject, Row
from sarm.evaluate.benchmarks.benchmark import BadRow, Benchmark, BenchmarkRow
from sarm.evaluate.benchmarks.fields import Fault
from sarm.evaluate.benchmarks.registry import benchmark_named


def read_benchmark(name: str, rows: Iterable[Row | Reject]) -> tuple[list[BenchmarkRow], list[BadRow]]:
    """The usable rows of a benchmark in file order, and the others with their reasons.

    Raises UserError for an unknown benchmark.
    """
    benchmark = benchmark_named(name)
    good: list[BenchmarkRow] = []
    bad: list[BadRow] = []
    for number, row in enumerate(rows):
        if isinstance(row, Reject):
            bad.append(BadRow(name, row.where, row.reason))
            continue
        try:
            good.append(_row(benchmark, row, number))
        except Fault as fault:
            bad.append(BadRow(name, row.where, str(fault)))
    seen: set[tuple[str, str]] = set()

    def repeated(row: BenchmarkRow) -> str | None:
        # Ids repeat across subsets.
        key = (row.subset, row.row_id)
        if key in seen:
            return f"repeated id {row.row_id[:40]}"
        seen.add(key)
        return None

    def one_sided(row: BenchmarkRow) -> str | None:
        partner = benchmark.lacks(row.subset, row.row_id, seen)
        return None if partner is None else f"no partner {partner}"

    for reason_of in (repeated, one_sided):
        good = _without(good, reason_of, bad)
    return good, bad


def _without(
    rows: list[BenchmarkRow], reason_of: Callable[[BenchmarkRow], str | None], bad: list[BadRow]
) -> list[BenchmarkRow]:
    """The rows that have no reason to be left out; the others are added to `bad`."""
    kept = []
    for row in rows:
        if (reason := reason_of(row)) is None:
            kept.append(row)
        else:
            bad.append(BadRow(row.benchmark, row.where, reason))
    return kept


def _row(benchmark: Benchmark, row: Row, number: int) -> BenchmarkRow:
    parsed = benchmark.parse(row.fields)
    prompt, chosen, rejected, subset = parsed
    if benchmark.subsets is not None and subset not in benchmark.subsets:
        raise Fault(f"unknown subset {subset[:40]!r}")
    for text, may_be_empty in (
        *((message["content"], False) for message in prompt),
        *((text, benchmark.scores_empty) for text in (*chosen, *rejected)),
    ):
        if (reason := fault_of_content(text)) and not (reason == "empty" and may_be_empty):
            raise Fault(f"{reason} text")
    identifier = row.fields.get("id")
    if identifier is None and benchmark.subsets is not None:
        raise Fault("missing id")
    row_id = str(identifier if identifier is not None else number)
    if reason := benchmark.fault(parsed, row_id):
        raise Fault(reason)
    partner = benchmark.partner(subset, row_id)
    return BenchmarkRow(
        benchmark=benchmark.name,
        subset=subset,
        row_id=row_id,
        cluster=prompt_id_of(prompt) if partner is None else partner.cluster,
        prompt=tuple(prompt),
        completions=(*chosen, *rejected),
        num_correct=len(chosen),
        where=row.where,
    )
