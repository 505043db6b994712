"""Columns of an extension type: what they mean is code that their file may bring.

What such a column means is decided by whoever registered its name, Ray's own unpickle it, and Arrow asks them as soon as a file is opened.
So the names are read out of the bytes first, by Arrow's format (a flatbuffer), and no library is asked.
"""

import base64
import struct
from collections.abc import Iterator
from pathlib import Path

# Types of Arrow itself (its list of canonical extensions), whose metadata is plain JSON.
CANONICAL = frozenset(
    f"arrow.{name}"
    for name in ("json", "uuid", "bool8", "opaque", "fixed_shape_tensor", "variable_shape_tensor", "parquet.variant")
)
_NAME = b"ARROW:extension:name"
_SCHEMA = b"ARROW:schema"
_TEXT_FOLLOWS = 0x18
_MAX_FOOTER_BYTES = 1 << 26
_MAX_FIELDS = 100_000
_CONTINUES = 0xFFFFFFFF
UNREADABLE = "unreadable"


def foreign_types_of_parquet(path: Path) -> set[str]:
    """The names of extension types that are none of Arrow's own; `unreadable` where they cannot be told."""
    with path.open("rb") as file:
        file.seek(-min(8, file.seek(0, 2)), 2)
        end = file.read()
        length = min(int.from_bytes(end[:4], "little"), _MAX_FOOTER_BYTES, file.tell() - 8) if len(end) == 8 else 0
        file.seek(-8 - max(length, 0), 2) if length > 0 else file.seek(0, 2)
        footer = file.read()
    if not any(mark in footer for mark in _EXTENSION_MARKS):
        return set()
    try:
        return _foreign(_schema_of(footer))
    except (ValueError, IndexError):
        return {UNREADABLE}


def _schema_of(footer: bytes) -> bytes:
    """Arrow's schema in a Parquet footer (Thrift's compact protocol: key, 0x18 for another text, its length, the text in base64).

    Opening the file with Arrow, even for its metadata, would ask who registered the types. Raises ValueError or IndexError.
    """
    # Of two schemas Arrow might read the other one.
    if footer.count(_SCHEMA) != 1:
        raise ValueError("not one schema")
    place = footer.index(_SCHEMA) + len(_SCHEMA)
    if footer[place] != _TEXT_FOLLOWS:
        raise ValueError("no text behind the key")
    length = shift = 0
    while True:
        place += 1
        length |= (footer[place] & 0x7F) << shift
        shift += 7
        if footer[place] < 0x80:
            break
    return base64.b64decode(footer[place + 1 : place + 1 + length], validate=True)


def foreign_types_of_arrow(path: Path) -> set[str]:
    """The same of an Arrow stream or file, whose first message is the schema."""
    with path.open("rb") as file:
        start = 8 if file.read(8) == b"ARROW1\0\0" else 0
        file.seek(start)
        head = file.read(8)
        if len(head) < 8:
            return set()
        first, second = struct.unpack("<II", head)
        length = second if first == _CONTINUES else first
        file.seek(start)
        message = file.read(min(length, _MAX_FOOTER_BYTES) + 8)
    return _foreign(message) if _NAME in message else set()


def _foreign(message: bytes) -> set[str]:
    try:
        names = set(_extension_names(message))
    except (struct.error, IndexError, ValueError, RecursionError):
        return {UNREADABLE}
    # The mark was there, so a schema that seems to have no such column is one that we misread.
    return (names or {UNREADABLE}) - CANONICAL


def _extension_names(message: bytes) -> Iterator[str]:
    """The names of the extension types in an encapsulated message that holds a schema, at whatever depth. Raises ValueError."""
    start = 8 if struct.unpack_from("<I", message)[0] == _CONTINUES else 4
    root = start + struct.unpack_from("<I", message, start)[0]
    schema = _followed(message, root, 2)
    if schema is None:
        raise ValueError("a message without a header")
    waiting = list(_tables(message, schema, 1))
    visited = 0
    while waiting:
        field = waiting.pop()
        visited += 1
        if visited > _MAX_FIELDS:
            raise ValueError("more columns than any table has")
        for entry in _tables(message, field, 6):
            key, value = _followed(message, entry, 0), _followed(message, entry, 1)
            if key is not None and _text(message, key) == _NAME:
                yield _text(message, value).decode() if value is not None else UNREADABLE
        waiting += _tables(message, field, 5)


def _followed(message: bytes, table: int, slot: int) -> int | None:
    """Where the slot of a table points to; None where it is empty."""
    vtable = table - int(struct.unpack_from("<i", message, table)[0])
    if vtable < 0:
        raise ValueError("a table outside of the message")
    size = int(struct.unpack_from("<H", message, vtable)[0])
    if 4 + 2 * slot >= size:
        return None
    offset = int(struct.unpack_from("<H", message, vtable + 4 + 2 * slot)[0])
    if not offset:
        return None
    place = table + offset
    return place + int(struct.unpack_from("<I", message, place)[0])


def _tables(message: bytes, table: int, slot: int) -> Iterator[int]:
    """The tables in the list that a slot points to."""
    vector = _followed(message, table, slot)
    if vector is None:
        return
    (length,) = struct.unpack_from("<I", message, vector)
    if length > _MAX_FIELDS:
        raise ValueError("more entries than any table has")
    for number in range(length):
        place = vector + 4 + 4 * number
        yield place + int(struct.unpack_from("<I", message, place)[0])


def _text(message: bytes, place: int) -> bytes:
    (length,) = struct.unpack_from("<I", message, place)
    if place + 4 + length > len(message):
        raise ValueError("a text outside of the message")
    return message[place + 4 : place + 4 + length]


def _in_base64(word: bytes) -> tuple[bytes, ...]:
    """What every base64 text with this word in it has in it, wherever the word begins."""
    found = []
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + word)
        # Characters at both ends depend on what stands beside the word.
        whole = (before + len(word)) // 3 * 4
        found.append(encoded[(0, 2, 3)[before] : whole])
    return tuple(found)


# Arrow keeps its schema in the footer as base64.
_EXTENSION_MARKS = (_NAME, *_in_base64(_NAME))
