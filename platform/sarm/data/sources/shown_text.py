"""Texts of data as terminals and pages may show them: hostile until shown otherwise."""

import re

TERMINAL_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def clean_text(text: str, limit: int | None = None) -> str:
    """The text without terminal sequences, control characters, direction overrides and lone surrogates; line breaks stay.

    With a `limit`, at most that many characters from the end, after an ellipsis.
    """
    text = TERMINAL_SEQUENCES.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    text = INVISIBLE.sub("", text)
    return text if limit is None or len(text) <= limit else "…" + text[-limit:].lstrip()


def one_line(text: str) -> str:
    """The same with every run of white space as one space, as terminals print it."""
    return " ".join(clean_text(text).split())


def escape_markdown(text: str) -> str:
    """The text on one line, with nothing left that Markdown or HTML would act on (links, images, tags, table cells)."""
    text = re.sub(r"([\\`*_{}\[\]()#!|~])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
