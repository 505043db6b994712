"""Extractive labels: the terms that a latent's texts hold more often than texts in general do. No model, no API.

t terms (words and pairs of words), counted once a text. Score = log-odds ratio with an informative Dirichlet prior, in standard
deviations (Monroe, Colaresi, Quinn 2008, section 3.5.1):
    z_t = (log odds_own(t) - log odds_rest(t)) / sqrt(1 / (y_own + a_t) + 1 / (y_rest + a_t)),  a_t = prior counts as in all texts
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

_WORD = re.compile(r"[^\W\d_][\w'’-]*", re.UNICODE)
_PRIOR = 10.0
_MIN_SCORE = 1.64
_MIN_TEXTS = 2
EXTRACTIVE = "extractive"


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
        self._total = sum(self._counts.values())

    def characteristic(self, texts: Sequence[str], num: int = 5) -> list[Term]:
        """The terms that set these texts (of those the background was made of) apart, strongest first; a longer term stands for its words."""
        own_texts = [self._terms[text] for text in dict.fromkeys(texts)]
        own = Counter(term for terms in own_texts for term in terms)
        num_own = sum(own.values())
        scored = []
        for term, count in own.items():
            if count < _MIN_TEXTS:
                continue
            rest, prior = self._counts[term] - count, _PRIOR * self._counts[term] / self._total
            here = math.log((count + prior) / (num_own + _PRIOR - count - prior))
            there = math.log((rest + prior) / (self._total - num_own + _PRIOR - rest - prior))
            score = (here - there) / math.sqrt(1 / (count + prior) + 1 / (rest + prior))
            if score >= _MIN_SCORE:
                scored.append(Term(term, score, count / len(own_texts)))
        # Of equal scores the longer, then the first in the alphabet: the same on every machine.
        scored.sort(key=lambda t: (-t.score, -len(t.term), t.term))
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
    return ", ".join(term.term for term in terms) if terms else "no characteristic terms"


def labels(texts_of: Mapping[int, Sequence[str]], more: Iterable[str] = ()) -> dict[int, list[Term]]:
    """Characteristic terms of every latent against the texts of all, and `more`."""
    background = Background({text for texts in texts_of.values() for text in texts} | set(more))
    return {latent: background.characteristic(texts) for latent, texts in texts_of.items()}
