"""Preference pairs out of the sources that `--data.pairs` names, in any of the layouts of `layouts`."""

from collections.abc import Collection, Iterable, Iterator
from itertools import islice

from sarm.data.sources.built_in import BUILT_IN_PAIRS
from sarm.data.sources.layouts import RawPair, has_layout, layouts_in_words, parse_pair, read_columns
from sarm.data.sources.rows import Reject, Row, data_set_rows, file_rows, is_data_set, parquet_schema, source_files
from sarm.settings.checks import UserError

# A few odd rows may open a file, but columns that none of these have are columns of another kind of data.
_PEEKED_ROWS = 20


def check_source(spec: str) -> None:
    """The cheap checks of a source: its files exist, have a known extension, and the columns of a known layout.

    Raises UserError.
    """
    for path in source_files(spec, BUILT_IN_PAIRS):
        if path.name.endswith(".parquet"):
            _require_layout(str(path), parquet_schema(path).names)
        else:
            _require_layout_of_first(str(path), list(islice(file_rows(path), _PEEKED_ROWS)))


def open_pairs(spec: str, limit: int | None = None) -> Iterator[RawPair | Reject]:
    """The pairs of one source in order, at most `limit` of them, and a `Reject` for each row that is no usable pair.

    `spec` is a path or glob of files of a known format (`rows.FORMATS`), `hf:NAME[:SPLIT]` or one of BUILT_IN_PAIRS.
    Reasons: those of a row (`bad_json`, `not_an_object`, `invalid_utf8`, `corrupt_file`), of a string (`not_text`,
    `nul_byte`, `lone_surrogate`), of a content (`too_long`, `already_templated`: a rendered conversation, in whatever template), and `no_chosen`, `no_rejected`, `no_prompt`, `no_preference`, `empty_prompt`,
    `empty_answer`, `equal_answers`, `prompt_differs`, `bad_roles`.
    Raises UserError, before the first pair, for a source that does not exist or whose columns fit no layout.
    """
    check_source(spec)
    return _pairs(spec, limit)


def _pairs(spec: str, limit: int | None) -> Iterator[RawPair | Reject]:
    kept = 0
    for row in _rows(spec):
        if isinstance(row, Reject):
            yield row
            continue
        pair = parse_pair(row.fields, spec)
        kept += isinstance(pair, RawPair)
        yield Reject(pair, row.where) if isinstance(pair, str) else pair
        if kept == limit:
            return


def _rows(spec: str) -> Iterator[Row | Reject]:
    if spec in BUILT_IN_PAIRS:
        for number, fields in enumerate(BUILT_IN_PAIRS[spec]()):
            yield fields if isinstance(fields, Reject) else Row(fields, f"{spec} row {number}")
    elif is_data_set(spec):
        rows = data_set_rows(spec)
        first = list(islice(rows, _PEEKED_ROWS))
        _require_layout_of_first(spec, first)
        yield from first
        yield from rows
    else:
        for path in source_files(spec, BUILT_IN_PAIRS):
            is_parquet = path.name.endswith(".parquet")
            yield from file_rows(path, read_columns(parquet_schema(path).names) if is_parquet else None)


def _require_layout_of_first(where: str, rows: Iterable[Row | Reject]) -> None:
    columns = list(dict.fromkeys(name for row in rows if isinstance(row, Row) for name in row.fields))
    # Nothing readable at all is counted by the reader, not judged by columns.
    if columns:
        _require_layout(where, columns)


def _require_layout(where: str, columns: Collection[str]) -> None:
    if not has_layout(columns):
        raise UserError(
            f"{where} holds no preference pairs: it has {', '.join(columns)}, expected {layouts_in_words()}."
        )
