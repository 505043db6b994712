"""Texts out of the sources that `--data.texts` names, one after the other, never a whole file in memory."""

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from sarm.data.sources.built_in import BUILT_IN_TEXTS, RESPONSE_SOURCES
from sarm.data.sources.containers.column_rows import schema_of
from sarm.data.sources.conversations import Message, fault_of, fault_of_messages, read_messages, transcript
from sarm.data.sources.files import file_rows, has_columns
from sarm.data.sources.hub import data_set_rows, is_data_set
from sarm.data.sources.places import source_files
from sarm.data.sources.rows import Reject, Row
from sarm.settings.checks import UserError

_BUILT_IN: Mapping[str, Callable[[], Iterable[Any]]] = ChainMap(BUILT_IN_TEXTS, RESPONSE_SOURCES)


class TextRecord(NamedTuple):
    """One text and the source it is from; of a conversation also its messages."""

    text: str
    source: str
    messages: list[Message] | None = None


def check_source(spec: str, text_field: str = "text") -> None:
    """The cheap checks of a source: its files exist, have a known extension, and Parquet has the text as a string, or as messages.

    Raises UserError.
    """
    for path in source_files(spec, _BUILT_IN):
        if has_columns(path):
            schema = schema_of(path)
            if text_field not in schema.names:
                raise _no_column(str(path), text_field, schema.names)
            kind = schema.field(text_field).type
            if not (_is_string(kind) or _is_messages(kind)):
                raise UserError(
                    f"column {text_field!r} of {path} is {kind}, expected strings, or lists of messages with role and content. Pass --data.text-field."
                )


def open_texts(spec: str, text_field: str = "text", limit: int | None = None) -> Iterator[TextRecord | Reject]:
    """The texts of one source in order, at most `limit` of them, and a `Reject` for each row without a usable text.

    `spec` is a path, pattern or folder of files of a known format (`files.FORMATS`), a data set (`hub.SYNTAX`) or one of BUILT_IN_TEXTS. Reasons: `bad_json`, `not_an_object`, `missing_text`, `not_a_string`, `empty`,
    `invalid_utf8`, `lone_surrogate`, `nul_byte`, `corrupt_file` (the rows before the damage are kept); of conversations also
    `not_text`, `bad_roles`, `too_long`, `already_templated`.
    Raises UserError, before the first text, for a source that does not exist or has no column `text_field`.
    """
    check_source(spec, text_field)
    return _texts(spec, text_field, limit)


def _texts(spec: str, text_field: str, limit: int | None) -> Iterator[TextRecord | Reject]:
    kept = 0
    for row in _rows(spec, text_field):
        record = row if isinstance(row, Reject) else _record(row, spec, text_field)
        kept += isinstance(record, TextRecord)
        yield record
        if kept == limit:
            return


def _rows(spec: str, text_field: str) -> Iterator[Row | Reject]:
    if spec in _BUILT_IN:
        for number, text in enumerate(_BUILT_IN[spec]()):
            yield Row({text_field: text}, f"{spec} row {number}")
    elif is_data_set(spec):
        for number, row in enumerate(data_set_rows(spec)):
            if number == 0 and isinstance(row, Row) and text_field not in row.fields:
                raise _no_column(spec, text_field, row.fields)
            yield row
    else:
        for path in source_files(spec, _BUILT_IN):
            yield from file_rows(path, [text_field])


def _record(row: Row, spec: str, text_field: str) -> TextRecord | Reject:
    text: Any = row.fields.get(text_field)
    if text is None:
        return Reject("missing_text", row.where)
    if isinstance(text, list):
        messages = read_messages(text)
        if isinstance(messages, str):
            return Reject(messages, row.where)
        reason = fault_of_messages(messages)
        return Reject(reason, row.where) if reason else TextRecord(transcript(messages), spec, messages)
    if not isinstance(text, str):
        return Reject("not_a_string", row.where)
    reason = fault_of(text)
    return Reject(reason, row.where) if reason else TextRecord(text, spec)


def _no_column(where: str, text_field: str, columns: Iterable[str]) -> UserError:
    return UserError(f"{where} has no column {text_field!r}; it has {', '.join(columns)}. Pass --data.text-field.")


def _is_string(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    # Its values may be texts, or messages.
    if isinstance(kind, pa.JsonType):
        return True
    is_string: bool = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_string


def _is_messages(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list_view(kind)
    return (
        is_list
        and pa.types.is_struct(kind.value_type)
        and any(set(names) <= set(kind.value_type.names) for names in (("role", "content"), ("from", "value")))
    )
