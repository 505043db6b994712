"""Rows of plain text files: JSON in lines or as one value, tables with a header, and texts. All are streams of bytes here."""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from sarm.data.sources.containers.packing import lines_of
from sarm.data.sources.conversations import spelled_messages
from sarm.data.sources.rows import CHUNK_BYTES, MAX_LINE_BYTES, Reject, Row

_BOM = b"\xef\xbb\xbf"
_DELIMITERS = ",;\t|"
# How far a text file is looked at for a blank line.
_PEEKED_BYTES = 1 << 20
# Under these, an object that is a whole file may hold its rows.
_ROW_KEYS = ("data", "rows", "examples", "instances", "train", "test", "validation")
_ABOUT_ROWS = ("version", "name", "info", "metadata")
# Bytes that are no UTF-8, as `surrogateescape` decodes them.
_ESCAPED = re.compile("[\udc80-\udcff]")
_SPACE = re.compile(r"[\s,]*")


def json_rows(where: str, chunks: Iterator[bytes]) -> Iterator[Row | Reject]:
    """JSON, told by its content: a list of objects, an object over several lines, or lines with an object each."""
    head, chunks = _peeked(chunks, CHUNK_BYTES)
    opening, _, others = head.removeprefix(_BOM).lstrip().partition(b"\n")
    if opening[:1] == b"[" and not (others.strip() and _is_json(opening)):
        yield from _list_rows(where, chunks)
        return
    lines = lines_of(chunks)
    read = _read_ahead(lines) if opening[:1] == b"{" and not (others.strip() and _is_json(opening)) else []
    try:
        whole = json.loads(b"\n".join(line or b"" for line in read).decode("utf-8-sig"))
    except (ValueError, RecursionError):
        whole = None
    yield from _object_rows(where, whole) if isinstance(whole, dict) else line_rows(where, chain(read, lines))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except (ValueError, RecursionError):
        return False


def _read_ahead(lines: Iterator[bytes | None]) -> list[bytes | None]:
    """As many lines as an object that is a whole file may have; of lines with an object each, those that do not cost much."""
    read: list[bytes | None] = []
    size = 0
    for line in lines:
        read.append(line)
        size += len(line or b"")
        # Who writes an object over several lines writes a brace alone, or a brace and a key, in the first.
        if size > MAX_LINE_BYTES or (read[0] or b"").rstrip().endswith(b"}"):
            break
    return read


def _object_rows(where: str, value: dict[str, Any]) -> Iterator[Row | Reject]:
    key = next((key for key in _ROW_KEYS if isinstance(value.get(key), list)), None)
    if key is None or value.keys() - {key, *_ABOUT_ROWS}:
        yield Row(value, f"{where}:1")
        return
    for number, fields in enumerate(value[key]):
        at = f"{where} row {number}"
        yield Row(fields, at) if isinstance(fields, dict) else Reject("not_an_object", at)


def line_rows(where: str, lines: Iterator[bytes | None]) -> Iterator[Row | Reject]:
    """Lines of JSON, an object each; blank ones are passed over."""
    for number, line in enumerate(lines, start=1):
        at = f"{where}:{number}"
        if line is None:
            yield Reject("line_too_long", at)
            continue
        if not line.strip():
            continue
        try:
            fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            yield Reject("invalid_utf8", at)
        except (ValueError, RecursionError):
            yield Reject("bad_json", at)
        else:
            yield Row(fields, at) if isinstance(fields, dict) else Reject("not_an_object", at)


def _list_rows(where: str, chunks: Iterator[bytes]) -> Iterator[Row | Reject]:
    """The objects of one list, as they come; behind what is no JSON nothing can be read."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    parse = json.JSONDecoder().raw_decode
    text, place, number = "", 0, -1
    parts: list[str] = []
    size = wanted = 0
    for chunk in chain(chunks, [b""]):
        is_last = not chunk
        parts.append(decode(chunk, final=is_last))
        size += len(parts[-1])
        # An object that is not whole is tried again when there is twice as much of it, so that time stays linear.
        if size < wanted and not is_last:
            continue
        text, place, parts, size = text[place:] + "".join(parts), 0, [], 0
        if number < 0:
            text, place, number = text.removeprefix("\ufeff").lstrip(), 1, 0
        while True:
            place = _end_of_space(text, place)
            if text[place : place + 1] == "]":
                if text[place + 1 :].strip():
                    yield Reject("bad_json", f"{where} row {number}")
                return
            try:
                fields, end = parse(text, place)
            except (ValueError, RecursionError):
                end = -1
            # A number may go on in the next chunk.
            if end in (-1, len(text)) and not is_last:
                break
            at = f"{where} row {number}"
            if end < 0:
                yield Reject("bad_json", at)
                return
            yield Row(fields, at) if isinstance(fields, dict) else Reject("not_an_object", at)
            place, number = end, number + 1
        wanted = len(text) - place
        if wanted > 2 * MAX_LINE_BYTES:
            yield Reject("line_too_long", f"{where} row {number}")
            return


def _end_of_space(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    assert space is not None
    return space.end()


def csv_rows(where: str, chunks: Iterator[bytes], delimiter: str | None = None) -> Iterator[Row | Reject]:
    """The rows of a table whose first line names the columns; the delimiter is told by that line unless given.

    Cells are texts, and empty ones are null; a cell that holds a list of messages as JSON is that list. Of a table whose header cannot be
    read, or names a column twice, nothing can be read.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = lines_of(chunks)
    header = next(lines, None)
    if header is None:
        return
    first = header.removeprefix(_BOM).decode("utf-8", "surrogateescape")
    if header.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or _ESCAPED.search(first):
        yield Reject("invalid_utf8", f"{where}:1")
        return
    delimiter = delimiter or max(_DELIMITERS, key=first.count)
    too_long: list[int] = []
    table = csv.reader(chain([f"{first}\n"], _decoded(lines, too_long)), delimiter=delimiter)
    columns = [name.strip() for name in next(table, [])]
    if len(named := [name for name in columns if name]) > len(set(named)):
        yield Reject("repeated_column", f"{where}:1")
        return
    while True:
        at = f"{where}:{table.line_num + 1}"
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error:
            yield Reject("bad_csv", at)
            continue
        finally:
            yield from (Reject("line_too_long", f"{where}:{number}") for number in too_long)
            too_long.clear()
        if not any(cells):
            continue
        if len(cells) != len(columns):
            yield Reject("ragged_row", at)
        elif any(_ESCAPED.search(cell) for cell in cells):
            yield Reject("invalid_utf8", at)
        else:
            yield Row({name: spelled_messages(cell) or None for name, cell in zip(columns, cells, strict=True)}, at)


def _decoded(lines: Iterator[bytes | None], too_long: list[int]) -> Iterator[str]:
    for number, line in enumerate(lines, start=2):
        if line is None:
            too_long.append(number)
        yield "\n" if line is None else line.decode("utf-8", "surrogateescape") + "\n"


def txt_rows(where: str, chunks: Iterator[bytes]) -> Iterator[Row | Reject]:
    """Texts that blank lines set apart; where the first megabyte has no blank line, each line is a text."""
    head, chunks = _peeked(chunks, _PEEKED_BYTES)
    by_line = re.search(rb"\n[ \t\r]*\n", head.strip()) is None
    text: list[bytes] = []
    size = start = 0
    for number, line in enumerate(chain(lines_of(chunks), [b""]), start=1):
        if line is None:
            yield Reject("line_too_long", f"{where}:{number}")
        elif line.strip():
            start = start if text else number
            size += len(line) + 1
            # Of what is too long nothing has to be kept.
            if size > MAX_LINE_BYTES:
                text.clear()
            text.append(line.removesuffix(b"\r"))
            if not by_line:
                continue
        if text:
            yield _text_row(text, size, f"{where}:{start}")
        text, size = [], 0


def _text_row(lines: list[bytes], size: int, at: str) -> Row | Reject:
    if size > MAX_LINE_BYTES:
        return Reject("line_too_long", at)
    try:
        return Row({"text": b"\n".join(lines).removeprefix(_BOM).decode()}, at)
    except UnicodeDecodeError:
        return Reject("invalid_utf8", at)


def _peeked(chunks: Iterator[bytes], size: int) -> tuple[bytes, Iterator[bytes]]:
    """(the first bytes, at least `size` that are no white space if there are as many; all chunks, these among them)."""
    read: list[bytes] = []
    num = 0
    try:
        while num < size and (chunk := next(chunks, None)) is not None:
            read.append(chunk)
            num += len(chunk.strip())
    except Exception as error:  # what came before the damage is read first
        return b"".join(read), chain(read, _raising(error))
    return b"".join(read), chain(read, chunks)


def _raising(error: Exception) -> Iterator[bytes]:
    raise error
    yield b""
