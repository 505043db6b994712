"""How control tokens are spelled: in texts, in templates, and by a vocabulary. Needs `tokenizers` and `jinja2` alone."""

import ast
import json
import re
from collections.abc import Collection, Iterable
from typing import Any

import jinja2
from tokenizers import models


class NotEncodableError(ValueError):
    """A tokenizer or a text with which control tokens cannot be told from text."""


def any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of these texts at a place, as a tree, so that thousands with a common beginning cost no more than one."""
    branches: dict[str, list[str]] = {}
    for text in texts:
        branches.setdefault(text[:1], []).append(text[1:])
    ends = branches.pop("", None) is not None
    parts = [re.escape(first) + any_of(rest) for first, rest in branches.items()]
    if not parts:
        return "" if ends else r"(?!)"
    if len(parts) == 1 and not ends:
        return parts[0]
    return f"(?:{'|'.join(parts)}){'?' if ends else ''}"


def literals_of(template: str) -> list[str]:
    """The strings in the code of a template; none where it is not jinja's."""
    try:
        tokens = list(jinja2.Environment(autoescape=False).lex(template))
        return [ast.literal_eval(text) for _, kind, text in tokens if kind == "string"]
    except (jinja2.TemplateSyntaxError, SyntaxError, ValueError):
        return []


def unknown_id(model: Any) -> int | None:
    """The id that the model gives to what it has no token for."""
    if isinstance(model, models.Unigram):
        # It tells it to those alone who read its state.
        unknown: int | None = json.loads(model.__getstate__())["unk_id"]
        return unknown
    text = getattr(model, "unk_token", None)
    return None if text is None else model.token_to_id(text)


def pieces_of(spelling: str, model: Any, control_ids: Collection[int], unknown: int | None) -> list[int]:
    """Ids of the characters of a control token's spelling, of their bytes where the vocabulary lacks a character.

    Raises NotEncodableError where it lacks those too.
    """
    pieces: list[int] = []
    for character in spelling:
        own = model.token_to_id(character)
        of_bytes = [model.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]
        if own is not None and own not in control_ids:
            pieces.append(own)
        elif None not in of_bytes:
            pieces += of_bytes
        elif unknown is not None:
            pieces.append(unknown)
        else:
            raise NotEncodableError(
                f"the vocabulary has {spelling!r} and not its characters, so a content that spells this control token cannot be encoded as text. Leave it out."
            )
    return pieces
