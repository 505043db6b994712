"""Parquet columns of an extension type: what they mean is code that their file may bring."""

import base64
from pathlib import Path


def names_extension_type(path: Path) -> bool:
    """Whether the file's footer has Arrow's mark of an extension type.

    Looked for in the bytes: what such a column means is decided by whoever registered its name, Ray's own unpickle it, and Arrow asks
    them as soon as the file is opened.
    """
    with path.open("rb") as file:
        file.seek(-min(8, file.seek(0, 2)), 2)
        end = file.read()
        length = min(int.from_bytes(end[:4], "little"), _MAX_FOOTER_BYTES, file.tell() - 8) if len(end) == 8 else 0
        file.seek(-8 - max(length, 0), 2) if length > 0 else file.seek(0, 2)
        footer = file.read()
    return any(mark in footer for mark in _EXTENSION_MARKS)


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
_EXTENSION_MARKS = (b"ARROW:extension:name", *_in_base64(b"ARROW:extension:name"))
_MAX_FOOTER_BYTES = 1 << 26
