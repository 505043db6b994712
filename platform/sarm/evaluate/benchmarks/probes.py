"""Edits of a text that leave its meaning alone: does the ranking survive them? (after reWordBench, EMNLP 2025)

Each edit depends on the text alone, so a probe can be repeated and its scores can be cached.
"""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sarm.evaluate.benchmarks.rows import ScoredRow
from sarm.evaluate.intervals import Interval, share_interval
from sarm.settings.benchmarks import PROBES

_MARKUP = re.compile(r"^(?:#{1,6} |[-*+] |\d+[.)] |> )|\*\*|__|`", re.M)
_TYPO_EVERY_WORDS = 25


def edit_conversation(
    probe: str, messages: Sequence[dict[str, str]], completion: str
) -> tuple[list[dict[str, str]], str]:
    """The conversation under a probe: quoting edits the last user turn, the others the completion."""
    turns = [dict(message) for message in messages]
    if probe == "quoting":
        turns[-1]["content"] = f'"{turns[-1]["content"]}"'
        return turns, completion
    return turns, _EDITS[probe](completion)


def markup_count(text: str) -> int:
    """Headings, list items, quotations, bold and code marks of a text: what a style control controls for."""
    return len(_MARKUP.findall(text))


def _typos(text: str) -> str:
    """Two neighbouring letters swapped in about every 25th word of four letters or more."""
    rng = random.Random(int(hashlib.sha256(text.encode()).hexdigest()[:16], 16))

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() * _TYPO_EVERY_WORDS >= 1:
            return word
        i = rng.randrange(1, len(word) - 2)
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]

    return re.sub(r"[A-Za-z]{4,}", swap, text)


def _casing(text: str) -> str:
    return text.lower()


def _whitespace(text: str) -> str:
    """Line breaks doubled and a space after each sentence doubled; nothing else moves."""
    return re.sub(r"([.!?]) (?=\S)", r"\1  ", re.sub(r"(?<!\n)\n(?!\n)", "\n\n", text)) + "\n"


def _markdown(text: str) -> str:
    """Markdown's marks taken out; where there are none, the first sentence in bold."""
    if markup_count(text):
        return _MARKUP.sub("", text)
    first = re.match(r".+?(?:[.!?](?=\s|$)|$)", text, re.S)
    return f"**{first[0]}**{text[first.end() :]}" if first else text


_EDITS: dict[str, Callable[[str], str]] = {
    "typos": _typos,
    "casing": _casing,
    "whitespace": _whitespace,
    "markdown": _markdown,
}
assert {*_EDITS, "quoting"} == set(PROBES)


@dataclass(frozen=True)
class Flips:
    """What an edit does to the order of (correct, wrong) pairs, each row counting once."""

    num_rows: int
    flipped: float
    """Share of pairs whose order changes."""
    flipped_ci95: Interval
    accuracy_before: float
    accuracy_after: float


def flips(plain: Sequence[ScoredRow], edited: Sequence[ScoredRow]) -> Flips | None:
    """How often the order of pairs changes under an edit.

    Rows are joined by subset and id; equal scores are an order of their own. None if no row is in both.
    """
    before = {(row.subset, row.row_id): row for row in plain}
    pairs = [(before[key], row) for row in edited if (key := (row.subset, row.row_id)) in before]
    if not pairs:
        return None
    signs = [(_signs(a), _signs(b)) for a, b in pairs]
    flipped = np.array([float((a != b).mean()) for a, b in signs])
    interval = share_interval(flipped, np.array([a.cluster for a, _ in pairs]))
    return Flips(
        num_rows=len(pairs),
        flipped=float(flipped.mean()),
        flipped_ci95=interval,
        accuracy_before=float(np.mean([(a > 0).mean() for a, _ in signs])),
        accuracy_after=float(np.mean([(b > 0).mean() for _, b in signs])),
    )


def _signs(row: ScoredRow) -> Any:
    return np.sign(row.scores[: row.num_correct, None] - row.scores[None, row.num_correct :]).ravel()
