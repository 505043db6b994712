"""What others may have written: JSON read strictly, names that stay inside their folder, keys where they would be logged."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

MAX_JSON_BYTES = 64 << 20
# As the services write them: OpenAI and its like, Hugging Face, AWS, GitHub, Slack, PEM.
_KEYS = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|xox[abprs]-[A-Za-z0-9-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_PASSWORD_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises OSError, or ValueError for what JSON is not (NaN, a key given twice) and for what would take the process down (nesting,
    numbers of thousands of digits, size).
    """
    if (size := path.stat().st_size) > max_bytes:
        raise ValueError(f"it has {size:,} bytes, more than {max_bytes:,}")
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """`read_json` of a text."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_refuse_repeated)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder; raises ValueError for a name that leads, or is a link that leads, out of it."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is no file of this folder")
    found = folder / path
    if found.is_symlink() and not found.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} is a link out of this folder")
    return found


def holds_a_secret(text: str) -> bool:
    """Whether a text looks as if it held a key, or an address a password."""
    return bool(_KEYS.search(text) or _PASSWORD_IN_URL.search(text))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse_repeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found
