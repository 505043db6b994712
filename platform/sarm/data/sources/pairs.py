"""Preference pairs out of the sources that `--data.pairs` names, in any of the layouts of `layouts`."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from sarm.data.sources.built_in import BUILT_IN_PAIRS
from sarm.data.sources.containers.column_rows import schema_of
from sarm.data.sources.files import file_rows, has_columns
from sarm.data.sources.hub import data_set_rows, is_data_set
from sarm.data.sources.layouts.layout import RawPair
from sarm.data.sources.layouts.registry import (
    CARRIED,
    LAYOUTS,
    RowOutcome,
    close_columns,
    has_layout,
    known_columns,
    layout_of,
    nearest_in_words,
    outcomes,
)
from sarm.data.sources.places import source_files
from sarm.data.sources.rows import LeftOut, Reject, Row
from sarm.settings.checks import UserError

# A few odd rows may open a file, but columns that none of these have are columns of another kind of data.
_PEEKED_ROWS = 20
Columns = Mapping[str, str]
"""What the user says of columns: the name that a layout knows -> the name in the source, with dots for what lies deeper."""


def check_source(spec: str, columns: Columns | None = None) -> None:
    """The cheap checks of a source: its files exist, have a known extension, and the columns of a known layout.

    Raises UserError.
    """
    for path in source_files(spec, BUILT_IN_PAIRS):
        if has_columns(path):
            _require_layout(str(path), schema_of(path).names, columns or {})
        else:
            _require_layout_of_first(str(path), list(islice(file_rows(path), _PEEKED_ROWS)), columns or {})


def open_pairs(
    spec: str, limit: int | None = None, columns: Columns | None = None
) -> Iterator[RawPair | Reject | LeftOut]:
    """The pairs of one source in order, at most `limit` of them, and a `Reject` for each row that makes no usable pair.

    `spec` is a path, pattern or folder of files of a known format (`files.FORMATS`), a data set (`hub.SYNTAX`) or one of BUILT_IN_PAIRS.
    A row with several answers may make several pairs; an answer of it that cannot be used is a `LeftOut` if others can. Reasons:
    docs/compatibility.md.
    Raises UserError, before the first pair, for a source that does not exist or whose columns fit no layout.
    """
    check_source(spec, columns)
    return _pairs(spec, limit, columns or {})


def row_outcomes(spec: str, columns: Columns | None = None, limit: int | None = None) -> Iterator[RowOutcome | Reject]:
    """What became of each row of a source, or of the first `limit`: exactly one outcome for a row."""
    columns = columns or {}
    rejected: list[Reject] = []
    rows = islice(_rows(spec, columns), limit)
    mapped = () if spec in BUILT_IN_PAIRS else columns.keys()
    for outcome in outcomes(_without_rejects(rows, rejected), spec, mapped):
        yield from rejected
        rejected.clear()
        yield outcome
    yield from rejected


def _without_rejects(rows: Iterable[Row | Reject], rejected: list[Reject]) -> Iterator[Row]:
    for row in rows:
        if isinstance(row, Reject):
            rejected.append(row)
        else:
            yield row


def _pairs(spec: str, limit: int | None, columns: Columns) -> Iterator[RawPair | Reject | LeftOut]:
    kept = 0
    for outcome in row_outcomes(spec, columns):
        if isinstance(outcome, Reject):
            yield outcome
            continue
        if outcome.reason is not None:
            yield Reject(outcome.reason, outcome.where)
        yield from (LeftOut(reason, outcome.where) for reason in outcome.left_out)
        for pair in outcome.pairs:
            yield pair
            kept += 1
            if kept == limit:
                return


def _rows(spec: str, columns: Columns) -> Iterator[Row | Reject]:
    if spec in BUILT_IN_PAIRS:
        for number, fields in enumerate(BUILT_IN_PAIRS[spec]()):
            yield fields if isinstance(fields, Reject) else Row(fields, f"{spec} row {number}")
    elif is_data_set(spec):
        rows = data_set_rows(spec)
        first = list(islice(rows, _PEEKED_ROWS))
        _require_layout_of_first(spec, first, columns)
        yield from _renamed(first, columns)
        yield from _renamed(rows, columns)
    else:
        for path in source_files(spec, BUILT_IN_PAIRS):
            yield from _renamed(
                file_rows(path, _wanted(schema_of(path).names, columns) if has_columns(path) else None), columns
            )


def _wanted(names: Iterable[str], columns: Columns) -> list[str]:
    """Those of a file's columns that some layout, or the user's own choice, reads."""
    known = known_columns() | set(columns.values()) | {source.partition(".")[0] for source in columns.values()}
    return [name for name in names if name in known]


def _renamed(rows: Iterable[Row | Reject], columns: Columns) -> Iterator[Row | Reject]:
    for row in rows:
        if isinstance(row, Reject) or not columns:
            yield row
            continue
        chosen = {name: _at(row.fields, source) for name, source in columns.items()}
        yield Row({**row.fields, **chosen}, row.where)


def _at(fields: Mapping[str, Any], path: str) -> Any:
    if path in fields:
        return fields[path]
    value: Any = fields
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _require_layout_of_first(where: str, rows: Sequence[Row | Reject], columns: Columns) -> None:
    read = [row for row in rows if isinstance(row, Row)]
    names = list(dict.fromkeys(name for row in read for name in row.fields))
    # Nothing readable at all is counted by the reader, not judged by columns.
    if not names:
        return
    _require_layout(where, names, columns)
    # Columns of one answer each, such as an instruction and its output, may bear the names of a layout's.
    sides = {"chosen", "rejected"} & {*names, *columns}
    if not sides and all(layout_of(row.fields) is None for row in _renamed(read, columns) if isinstance(row, Row)):
        raise _no_layout(where, names, columns)


def _require_layout(where: str, names: Collection[str], columns: Columns) -> None:
    lacking = [source for source in columns.values() if source not in names and source.partition(".")[0] not in names]
    if lacking:
        raise UserError(f"{where} has no column {lacking[0]!r}, which --data.columns names; it has {_listed(names)}.")
    if columns and not any((layout.columns | CARRIED).issuperset(columns) for layout in LAYOUTS):
        odd = next((name for name in columns if name not in known_columns()), next(iter(columns)))
        meant = (
            f"{odd!r} may be {' or '.join(near)}."
            if (near := close_columns(odd))
            else "docs/compatibility.md lists the columns of each."
        )
        raise UserError(f"--data.columns names {', '.join(columns)}, which no layout reads together. {meant}")
    if not has_layout({*names, *columns}):
        raise _no_layout(where, names, columns)


def _no_layout(where: str, names: Collection[str], columns: Columns) -> UserError:
    return UserError(
        f"{where} holds no preference pairs: it has {_listed(names)}. Near layouts are {nearest_in_words({*names, *columns})}. Pass --data.columns prompt=...,chosen=...,rejected=... to say which columns these are; docs/compatibility.md lists all layouts."
    )


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown
