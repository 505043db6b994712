"""Labels that no model writes: the terms of a latent's contexts that its background lacks. V terms, n texts.

Counts are of texts, not of occurrences: a term counts once a text. With y of the contexts' n texts and b of the background's N,
and a prior of a_w = A b_w / sum b pseudo-texts a term (Monroe et al. 2008, eq. 16 and 22):
delta = log((y+a)/(n-y+A-a)) - log((b+a)/(N-b+A-a))    z = delta / sqrt(1/(y+a) + 1/(b+a))
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer

EXTRACTIVE = "extractive"
"""The explainer's name in explanations/v1."""
NO_TERMS = "no characteristic terms"

# Words of two letters at least, apostrophes inside: in any script that separates words.
_WORD = r"(?u)\b\w[\w'’]*\w\b"
_PRIOR_TEXTS = 10.0
_MIN_Z = 1.96
# A term of one context is that text's, not the latent's.
_MIN_TEXTS = 2


class ExtractiveLabels:
    """Labels against one background, which is read once; contexts may be part of it."""

    def __init__(self, background: Sequence[str]):
        self._vectorizer = CountVectorizer(binary=True, ngram_range=(1, 2), token_pattern=_WORD, min_df=_MIN_TEXTS)
        try:
            counts_V = np.asarray(self._vectorizer.fit_transform(background).sum(axis=0)).ravel().astype(np.float64)
            self._names: NDArray[np.object_] = self._vectorizer.get_feature_names_out()
        except ValueError:
            # No word occurs in two texts: there is nothing to compare.
            counts_V, self._names = np.zeros(0), np.zeros(0, dtype=object)
        self._background_V, self._num_background = counts_V, len(background)
        self._prior_V = _PRIOR_TEXTS * counts_V / max(1.0, counts_V.sum())

    def terms(self, contexts: Sequence[str], num_terms: int = 5) -> list[str]:
        """At most `num_terms` words and pairs of words that are more frequent in `contexts`, by z; only those with z > 1.96.

        A word that comes with a chosen pair in the same contexts, and not otherwise, is left to the pair.
        """
        contexts = list(dict.fromkeys(contexts))
        if not contexts or not len(self._names):
            return []
        y_V = np.asarray(self._vectorizer.transform(contexts).sum(axis=0)).ravel().astype(np.float64)
        z_V = self._z(y_V, len(contexts))
        chosen: list[str] = []
        for i in np.lexsort((self._names.astype(str), -z_V)):
            if z_V[i] <= _MIN_Z or len(chosen) == num_terms:
                break
            words = set(self._names[i].split())
            if y_V[i] >= _MIN_TEXTS and not any(words & set(other.split()) for other in chosen):
                chosen.append(self._names[i])
        return chosen

    def label(self, contexts: Sequence[str], num_terms: int = 5) -> str:
        """The terms as one line."""
        return ", ".join(f"“{term}”" for term in self.terms(contexts, num_terms)) or NO_TERMS

    def _z(self, y_V: NDArray[np.float64], n: int) -> NDArray[np.float64]:
        a_V, total = self._prior_V, _PRIOR_TEXTS
        own_V = np.log((y_V + a_V) / (n - y_V + total - a_V))
        all_V = np.log((self._background_V + a_V) / (self._num_background - self._background_V + total - a_V))
        return (own_V - all_V) / np.sqrt(1 / (y_V + a_V) + 1 / (self._background_V + a_V))
