"""Identifiers that depend on contents alone, and the shares that splits are made by."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence


def stable_id(*parts: str) -> str:
    """16 hexadecimal digits that depend on `parts` alone."""
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def stable_int(*parts: str) -> int:
    """A non-negative 63-bit integer that depends on `parts` alone: the `row_id` of a text or response."""
    return int(stable_id(*parts), 16) >> 1


def normalised(text: str) -> str:
    """The text without what makes no other prompt of it: Unicode form (NFKC), case, and how much white space stands where."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def _parts(message: Mapping[str, str | None], content: str) -> list[str]:
    more = message.get("more")
    return [str(message["role"]), content, *([more] if more else [])]


def prompt_id_of(messages: Sequence[Mapping[str, str]]) -> str:
    """Id of a prompt (all messages before the response), normalised; pairs of one prompt share it, and so a split and a place in intervals."""
    return stable_id(json.dumps([_parts(m, normalised(m["content"])) for m in messages], ensure_ascii=False))


def prompt_key_of(messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt to the letter: two prompts of one id are two texts to a model."""
    return json.dumps([_parts(m, m["content"]) for m in messages], ensure_ascii=False)


def response_id_of(messages: Sequence[Mapping[str, str]], response: str) -> str:
    """Id of a response to a prompt, both to the letter."""
    return stable_id(prompt_key_of(messages), response)


def hash_share(identifier: str) -> float:
    """A uniform number in [0, 1) that depends on the id alone: what splits data without ever seeing a result."""
    return int(hashlib.sha256(b"split:" + identifier.encode()).hexdigest()[:13], 16) / 16**13
