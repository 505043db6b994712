"""Official fields of a benchmark's row, checked: what is missing or of another type is a Fault with its reason."""

from collections.abc import Mapping
from typing import Any

from sarm.data.sources.conversations import Message


class Fault(Exception):  # noqa: N818 - a row's reason on its way to a BadRow
    """Why a row cannot be used; `read_benchmark` turns it into a BadRow."""


def text_in(fields: Mapping[str, Any], name: str) -> str:
    """A field that is a text."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise Fault(f"missing {name}" if value is None else f"{name} is not a text")
    return value


def texts_in(fields: Mapping[str, Any], name: str, count: int | None = None) -> list[str]:
    """A field that is a list of texts, `count` of them, or one text."""
    value = fields.get(name)
    if value is None:
        raise Fault(f"missing {name}")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
        raise Fault(f"{name} is not a list of texts")
    if count is not None and len(value) != count:
        raise Fault(f"{name} has {len(value)} completions, expected {count}")
    return list(value)


def prompt_in(fields: Mapping[str, Any]) -> list[Message]:
    """The field `prompt` as the user's turn."""
    return [{"role": "user", "content": text_in(fields, "prompt")}]


def subset_in(fields: Mapping[str, Any], *names: str) -> str:
    """The first of the named fields that is a text."""
    for name in names:
        if isinstance(fields.get(name), str):
            return str(fields[name])
    raise Fault(f"missing {names[0]}")
