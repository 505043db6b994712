"""Rows as sources give them. What is wrong with one row is a `Reject`, a value that the reader counts; what is wrong with a source is a UserError."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

CHUNK_BYTES = 1 << 16
# A row is held in memory whole.
MAX_LINE_BYTES = 1 << 26


class Reject(NamedTuple):
    """A row that cannot be used: a reason word to count by, and where the row is."""

    reason: str
    where: str


class LeftOut(NamedTuple):
    """An answer of a row that is in no pair, though other answers of the row are: a reason word, and where the row is."""

    reason: str
    where: str


class Row(NamedTuple):
    """A row as read, and where it is."""

    fields: dict[str, Any]
    where: str


class FileFormat(NamedTuple):
    """How files of one extension are read: `rows` takes the path, and the columns that are wanted where a file has columns."""

    rows: Callable[[Path, Sequence[str] | None], Iterator[Row | Reject]]
    unpacked: float
    """Bytes of rows that a byte of a file holds, about."""
    kind: str
    """What its content is, whatever it is packed with; of a folder's files only those of one kind are read."""
