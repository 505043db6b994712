"""What a source is taken for, from its first rows: containers, columns, layouts, and what becomes of the rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sarm.data.sources import pairs as pair_sources
from sarm.data.sources import texts as text_sources
from sarm.data.sources.built_in import BUILT_IN_PAIRS, BUILT_IN_TEXTS, RESPONSE_SOURCES
from sarm.data.sources.conversations import Message
from sarm.data.sources.files import file_rows
from sarm.data.sources.hub import data_set_rows, is_data_set
from sarm.data.sources.layouts.registry import LAYOUTS, has_layout, layout_of
from sarm.data.sources.pair_notes import PairNotes
from sarm.data.sources.places import kind_of, source_files
from sarm.data.sources.rows import LeftOut, Reject, Row
from sarm.settings.checks import UserError

_PEEKED_ROWS = 20


@dataclass
class Example:
    """A row as a model reads it: the messages, the last of which is the answer; the worse answer of a pair; where the row is."""

    messages: list[Message] | str
    rejected: str | None
    where: str


@dataclass
class Seen:
    """What was found in the first rows of a source."""

    container: str
    columns: list[str]
    is_pairs: bool
    num_rows: int = 0
    is_whole: bool = True
    num_used: int = 0
    """Rows that make pairs, alone or with others, or texts."""
    num_pairs: int = 0
    layouts: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """Where the first row of each reason is."""
    examples: list[Example] = field(default_factory=list)
    notes: PairNotes = field(default_factory=PairNotes)

    def reject(self, reason: str, where: str) -> None:
        """Count a row that cannot be used."""
        self.rejected[reason] += 1
        self.first.setdefault(reason, where)


def inspect_source(spec: str, columns: Mapping[str, str], text_field: str, limit: int) -> Seen:
    """Look at the first `limit` rows of a source. Raises UserError if it cannot be opened, or holds neither preferences nor texts."""
    made_in_code = {**BUILT_IN_PAIRS, **BUILT_IN_TEXTS, **RESPONSE_SOURCES}
    files = source_files(spec, made_in_code)
    seen = Seen(container=kind_of(spec, files), columns=[], is_pairs=spec in BUILT_IN_PAIRS)
    if spec not in made_in_code:
        rows = data_set_rows(spec) if is_data_set(spec) else (row for path in files for row in file_rows(path))
        unread: list[Reject] = []
        peeked = list(islice(_readable(islice(rows, limit), unread), _PEEKED_ROWS))
        if not peeked:
            raise _nothing_read(spec, unread)
        seen.columns = list(dict.fromkeys(name for row in peeked for name in row.fields))
        seen.is_pairs = has_layout({*seen.columns, *columns}) and (
            bool(columns) or any(layout_of(row.fields) for row in peeked) or {"chosen", "rejected"} <= set(seen.columns)
        )
        holds_texts = not columns and text_field in seen.columns
        if seen.columns and not seen.is_pairs and not holds_texts:
            _refuse(spec, columns, seen, text_field)
    _see_pairs(seen, spec, columns, limit) if seen.is_pairs else _see_texts(seen, spec, text_field, limit)
    return seen


def _readable(rows: Iterable[Row | Reject], unread: list[Reject]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Row):
            yield row
        else:
            unread.append(row)


def _nothing_read(spec: str, unread: Sequence[Reject]) -> UserError:
    reasons = ", ".join(f"{number} {reason}" for reason, number in Counter(one.reason for one in unread).most_common())
    found = f"{reasons}, first {unread[0].where}" if unread else "it holds none"
    return UserError(f"no row of {spec} can be read ({found}). Check its packing, that it is UTF-8, and that its content is what its name says.")  # fmt: skip


def rule_of(name: str) -> str:
    """Which answer a layout takes for the better one."""
    return next(layout.rule for layout in LAYOUTS if layout.name == name)


def _refuse(spec: str, columns: Mapping[str, str], seen: Seen, text_field: str) -> None:
    if not columns and len(seen.columns) == 1:
        raise UserError(
            f"{spec} has no column {text_field!r}; it has {seen.columns[0]}. Pass --data.text-field {seen.columns[0]} if that is the text."
        )
    pair_sources.check_source(spec, columns)
    raise UserError(f"{spec} holds neither preferences nor texts; it has {', '.join(seen.columns[:20])}.")


def _see_pairs(seen: Seen, spec: str, columns: Mapping[str, str], limit: int) -> None:
    pair_sources.check_source(spec, columns)
    for outcome in pair_sources.row_outcomes(spec, columns, limit + 1):
        if seen.num_rows == limit:
            seen.is_whole = False
            break
        seen.num_rows += 1
        if isinstance(outcome, Reject):
            seen.reject(outcome.reason, outcome.where)
            continue
        if outcome.layout:
            seen.layouts[outcome.layout] += 1
        if outcome.reason is not None:
            seen.reject(outcome.reason, outcome.where)
            continue
        seen.num_used += 1
        seen.left_out.update(outcome.left_out)
        for pair in outcome.pairs:
            seen.num_pairs += 1
            seen.notes.add(pair.prompt, pair.chosen, pair.rejected)
            answer = {"role": "assistant", "content": pair.chosen}
            seen.examples.append(Example([*pair.prompt, answer], pair.rejected, outcome.where))


def _see_texts(seen: Seen, spec: str, text_field: str, limit: int) -> None:
    text_field = "messages" if spec in RESPONSE_SOURCES else text_field
    records: Iterator[Any] = text_sources.open_texts(spec, text_field)
    for record in records:
        if seen.num_rows == limit:
            seen.is_whole = False
            break
        seen.num_rows += 1
        if isinstance(record, (Reject, LeftOut)):
            seen.reject(record.reason, record.where)
            continue
        seen.num_used += 1
        seen.examples.append(Example(record.messages or record.text, None, ""))
