"""Characters that tokens cover, as spans of a text and of a part of it."""

from collections.abc import Sequence

from sarm.data.tokens.control_tokens import Span

NOWHERE: Span = (0, 0)
"""The span of a token that covers nothing of the text."""


def spans_within(text: str, part: str, spans: Sequence[Span]) -> list[Span]:
    """Spans of `text` as spans of the last place where it holds `part`, empty where they lie outside or it is not there."""
    stripped = part.strip()
    start = text.rfind(stripped) if stripped else -1
    if start < 0:
        return [NOWHERE] * len(spans)
    # Some templates strip what they are given.
    shift = part.find(stripped) - start
    inside = [(max(a, start), min(b, start + len(stripped))) for a, b in spans]
    return [(a + shift, b + shift) if a < b else NOWHERE for a, b in inside]
