"""All layouts, and what is asked of them: does a source hold preferences, and which pairs are in its rows.

Every row ends as one `RowOutcome`: with pairs, as part of the pairs of other rows, or with the reason word why it makes none.
`subset` (or `category`) and `margin` are carried over where they exist.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sarm.contracts.ids import prompt_key_of
from sarm.data.sources.conversations import fault_of, fault_of_content, fault_of_messages, spelled_messages
from sarm.data.sources.layouts.given_sides import GIVEN_SIDES
from sarm.data.sources.layouts.layout import Answers, Fault, Fields, Judged, Layout, RawPair, number_of, present
from sarm.data.sources.layouts.scored import SCORED
from sarm.data.sources.layouts.verdicts import VERDICTS
from sarm.data.sources.rows import Row

LAYOUTS: tuple[Layout, ...] = (*GIVEN_SIDES, *VERDICTS, *SCORED)
CARRIED = frozenset(("subset", "category", "margin"))
"""Columns beside those of a layout that are carried over."""
_NEAREST = 3
# Of a prompt with thousands of answers each meets those of its own stretch, since the number of pairs grows with the square.
MAX_TOGETHER = 64


class RowOutcome(NamedTuple):
    """What became of one row."""

    where: str
    layout: str
    """The name of its layout; empty where it fits none."""
    pairs: list[RawPair]
    reason: str | None
    """Why it makes no pair; None where it does, alone or with other rows."""
    left_out: list[str]
    """Why some of its answers are in no pair, though others are."""


def layout_of(fields: Fields, mapped: Collection[str] = ()) -> Layout | None:
    """The layout of a row: the first that it fits. One that reads all columns that the user has `mapped` goes before others.

    Files with columns have those of all their rows in each, so columns without a value count only where the others fit no layout.
    """
    known = {name: value for name, value in fields.items() if value is not None}
    fitting = [layout for layout in LAYOUTS if layout.fits(known)] or [
        layout for layout in LAYOUTS if layout.fits(fields)
    ]
    return next(
        (layout for layout in fitting if (layout.columns | CARRIED).issuperset(mapped)), fitting[0] if fitting else None
    )


def outcomes(rows: Iterable[Row], source: str, mapped: Collection[str] = ()) -> Iterator[RowOutcome]:
    """One outcome for each row: those of rows with several answers in order, those of rows with one answer when all rows are read."""
    judged: list[tuple[Row, Layout, Judged]] = []
    for source_row in rows:
        fields = {name: spelled_messages(value) for name, value in source_row.fields.items()}
        layout = layout_of(fields, mapped)
        row = Row({name: value for name, value in fields.items() if value is not None}, source_row.where)
        try:
            if layout is None:
                raise Fault(_reason_of_no_layout(fields))
            read = layout.read(row.fields)
            if isinstance(read, Judged):
                _check_prompt(read)
                _check_answer(read.answer)
                judged.append((row, layout, read))
            else:
                yield _outcome(row, layout, read, source)
        except Fault as fault:
            yield RowOutcome(row.where, layout.name if layout else "", [], str(fault), [])
    yield from _across_rows(judged, source)


def parse_pairs(fields: Fields, source: str) -> list[RawPair] | str:
    """The pairs in one row, or the reason word why there are none; of a row with one answer, `no_partner`."""
    (outcome,) = outcomes([Row(dict(fields), "")], source)
    return outcome.reason or outcome.pairs


def has_layout(columns: Collection[str]) -> bool:
    """Whether a source with these columns holds preferences in a known layout."""
    return any(all(not set(names).isdisjoint(columns) for names in layout.needs) for layout in LAYOUTS)


def nearest_in_words(columns: Collection[str]) -> str:
    """The columns that the layouts need which these columns are nearest to; of none, those of the plainest."""

    def found(layout: Layout) -> int:
        return sum(not set(names).isdisjoint(columns) for names in layout.needs)

    near = sorted(
        (layout for layout in LAYOUTS if 0 < found(layout) < len(layout.needs)),
        key=lambda one: (len(one.needs) - found(one), -found(one)),
    )
    return ", or ".join(dict.fromkeys(layout.needed() for layout in near[:_NEAREST])) or "prompt + chosen + rejected"


def known_columns() -> frozenset[str]:
    """Every column that some layout reads, or that is carried over."""
    return CARRIED.union(*(layout.columns for layout in LAYOUTS))


def close_columns(column: str) -> list[str]:
    """Known columns that are spelled nearly so."""
    return difflib.get_close_matches(column, known_columns(), 3)


def _reason_of_no_layout(fields: Fields) -> str:
    if "chosen" in fields or "rejected" in fields:
        present(fields, "chosen")
        present(fields, "rejected")
        return "not_text"
    return "unknown_layout"


def _outcome(row: Row, layout: Layout, read: Sequence[Answers], source: str) -> RowOutcome:
    pairs: list[RawPair] = []
    reasons: list[str] = []
    for answers in read:
        try:
            pairs.append(_pair(answers, row.fields, source))
        except Fault as fault:
            reasons.append(str(fault))
    if not pairs:
        return RowOutcome(row.where, layout.name, [], reasons[0], [])
    return RowOutcome(row.where, layout.name, pairs, None, reasons)


def _across_rows(judged: Sequence[tuple[Row, Layout, Judged]], source: str) -> Iterator[RowOutcome]:
    """Rows of one answer: those of one prompt make pairs, which stand with the row of the chosen answer."""
    of_prompt: dict[tuple[str, str], list[Judged]] = {}
    numbers = []
    for _, layout, read in judged:
        same = of_prompt.setdefault((layout.name, prompt_key_of(read.prompt)), [])
        numbers.append(len(same))
        same.append(read)
    for (row, layout, read), number in zip(judged, numbers, strict=True):
        same = of_prompt[layout.name, prompt_key_of(read.prompt)]
        if len(same) < 2:
            yield RowOutcome(row.where, layout.name, [], "no_partner", [])
            continue
        first = number - number % MAX_TOGETHER
        differs = [
            other
            for other in same[first : first + MAX_TOGETHER]
            if other.value != read.value and other.answer.strip() != read.answer.strip()
        ]
        worse = [other.answer for other in differs if other.value < read.value]
        pairs = [_pair(Answers(read.prompt, read.answer, answer), row.fields, source) for answer in worse]
        yield RowOutcome(row.where, layout.name, pairs, None if differs else "no_preference", [])


def _pair(answers: Answers, fields: Fields, source: str) -> RawPair:
    prompt, chosen, rejected = answers
    for answer in (chosen, rejected):
        if not isinstance(answer, str):
            raise Fault("not_text")
    _check_prompt(answers)
    _check_answer(chosen)
    _check_answer(rejected)
    if chosen.strip() == rejected.strip():
        raise Fault("equal_answers")
    subset = fields.get("subset", fields.get("category"))
    return RawPair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        source=source,
        subset=subset if isinstance(subset, str) and fault_of(subset) is None else None,
        margin=number_of(fields.get("margin")),
    )


def _check_prompt(read: Answers | Judged) -> None:
    if not read.prompt:
        raise Fault("empty_prompt")
    if read.prompt[-1]["role"] not in ("user", "tool"):
        raise Fault("bad_roles")
    if reason := fault_of_messages(read.prompt):
        raise Fault("empty_prompt" if reason == "empty" else reason)


def _check_answer(answer: Any) -> None:
    if not isinstance(answer, str):
        raise Fault("not_text")
    if reason := fault_of_content(answer):
        raise Fault("empty_answer" if reason == "empty" else reason)
