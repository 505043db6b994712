"""Extractive labels: the terms that a latent's texts hold more often than other texts do. No model, no API.

A term (word or pair of words) is in k of the latent's n texts and in K of the N others. Score = log odds ratio in standard deviations,
with one half added to each count (Haldane 1956; Anscombe 1956), so that a term that is nowhere else has a finite score:
    z = [log((k + .5) / (n - k + .5)) - log((K + .5) / (N - K + .5))] / sqrt(sum of 1 / (count + .5) over the four counts)
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_WORD = re.compile(r"[^\W\d_][\w'’-]*", re.UNICODE)
_MIN_SCORE = 1.64
_MIN_TEXTS = 2
EXTRACTIVE = "extractive"
"""The explainer's name in explanations/v1."""
NO_TERMS = "no characteristic terms"


class Term(NamedTuple):
    """A characteristic term, its score in standard deviations and the share of the latent's texts that hold it."""

    term: str
    score: float
    share: float


class Background:
    """In how many of all texts each term is."""

    def __init__(self, texts: Iterable[str]):
        self._terms = {text: terms_of(text) for text in texts}
        self._counts = Counter(term for terms in self._terms.values() for term in terms)

    def characteristic(self, texts: Sequence[str], num: int = 5) -> list[Term]:
        """The terms that set these texts (of those the background was made of) apart, strongest first; a longer term stands for its words."""
        own_texts = [self._terms[text] for text in dict.fromkeys(texts)]
        own = Counter(term for terms in own_texts for term in terms)
        num_own, num_rest = len(own_texts), len(self._terms) - len(own_texts)
        scored = []
        for term, count in own.items():
            rest = self._counts[term] - count
            cells = [count + 0.5, num_own - count + 0.5, rest + 0.5, num_rest - rest + 0.5]
            odds = math.log(cells[0] / cells[1]) - math.log(cells[2] / cells[3])
            score = odds / math.sqrt(sum(1 / cell for cell in cells))
            if count >= _MIN_TEXTS and score >= _MIN_SCORE:
                scored.append(Term(term, score, count / num_own))
        # Of equal scores the one of the rarest words ("herring" before "a red"), then the longest: the same on every machine.
        common = len(self._terms)
        scored.sort(
            key=lambda t: (
                -t.score,
                max(self._counts.get(word, common) for word in t.term.split()),
                -len(t.term),
                t.term,
            )
        )
        chosen: list[Term] = []
        for one in scored:
            words = set(one.term.split())
            if not any(words & set(other.term.split()) for other in chosen):
                chosen.append(one)
            if len(chosen) == num:
                break
        return chosen


def terms_of(text: str) -> frozenset[str]:
    """Lower-case words of a text and pairs of neighbours, each once."""
    words = [word.lower() for word in _WORD.findall(text)]
    return frozenset(word for word in words if len(word) > 1) | frozenset(
        f"{a} {b}" for a, b in itertools.pairwise(words)
    )


def label(terms: Sequence[Term]) -> str:
    """The terms as one line."""
    return ", ".join(term.term for term in terms) if terms else NO_TERMS


def labels(texts_of: Mapping[int, Sequence[str]], more: Iterable[str] = ()) -> dict[int, list[Term]]:
    """Characteristic terms of every latent against the texts of all, and `more`."""
    background = Background({text for texts in texts_of.values() for text in texts} | set(more))
    return {latent: background.characteristic(texts) for latent, texts in texts_of.items()}
