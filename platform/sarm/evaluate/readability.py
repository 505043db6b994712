"""Whether a reward can be read, in figures that need no judge. R responses, S d_sae, N pairs.

contribution of latent i to a response    w_i z_i
always-on share     of sum_i mean |w_i z_i|, what latents carry that fire on at least 95 % of responses
dense share         the same for latents that fire on over half of them
latents of a margin the fewest latents that carry half (nine tenths) of sum_i mean |w_i (z_i(chosen) - z_i(rejected))|
names AUC           how well words tell where a latent fires: a classifier of words and word pairs is fitted on the answers to some prompts
                    and ranks those to the others, for each of the 20 latents with the largest mean |w_i z_i|; their mean AUC
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import NDArray
from scipy import sparse, stats

ALWAYS_ON, DENSE = 0.95, 0.5
NAMED_LATENTS, TERMS_SHOWN = 20, 5
# Firing and silent responses without which an AUC says nothing.
_FEWEST = 8
_FOLDS, _RESAMPLES = 5, 300
_NEGATIONS = frozenset({"cannot", "cant", "never", "no", "none", "nor", "not", "nothing"})


@dataclass(frozen=True)
class Answered:
    """Codes of distinct responses, and the pairs that are made of them."""

    values: sparse.csr_array
    """z, 0 where a latent is silent."""
    prompts: Shaped[np.ndarray, " responses"]
    texts: Sequence[str]
    pairs: Int[np.ndarray, "pairs 2"]
    """Rows of the chosen and the rejected response."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval over prompts; None where it cannot be had."""

    value: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Readability:
    """The figures of one reward model on responses that nothing was trained on."""

    num_alive_at_reward: int
    """Latents that fire on at least one response."""
    always_on_share: Estimate
    dense_share: Estimate
    latents_half_margin: Estimate
    latents_ninety_margin: Estimate
    names_auc: Estimate | None
    """None where no latent fires on, and is silent on, enough responses."""


READABLE = tuple(one.name for one in fields(Readability))
"""The names of the figures."""


@dataclass(frozen=True)
class Named:
    """What words say of a latent."""

    latent: int
    auc: float
    terms: tuple[str, ...]
    """Words and word pairs that speak for its firing, the strongest first."""
    scores: NDArray[np.float64]
    """Of each response, by a classifier that did not see its prompt."""
    fires: NDArray[np.bool_]

    def figures(self) -> dict[str, Any]:
        """What is kept of it."""
        return {"auc": self.auc, "terms": list(self.terms)}


def readability(
    answered: Answered, weight_S: Float[np.ndarray, " d_sae"], named: Sequence[Named], seed: int = 0
) -> Readability:
    """All figures, with intervals by drawing prompts anew (percentile bootstrap); `named` is what `named_latents` gives."""
    fires_RS = answered.values != 0
    contributions_RS = _contributions(answered.values, weight_S)
    pair_prompts_N = answered.prompts[answered.pairs[:, 0]]
    chosen_N, rejected_N = answered.pairs.T
    margins_NS = sparse.csr_array(contributions_RS[chosen_N] - contributions_RS[rejected_N])

    def share_of(least: float) -> Callable[[NDArray[np.int64]], float]:
        return lambda rows: firing_share(contributions_RS[rows], fires_RS[rows], least)

    def latents_of(part: float) -> Callable[[NDArray[np.int64]], float]:
        return lambda rows: float(latents_carrying(margins_NS[rows], part))

    return Readability(
        num_alive_at_reward=int((fires_RS.sum(0) > 0).sum()),
        always_on_share=over_prompts(share_of(ALWAYS_ON), answered.prompts, seed),
        dense_share=over_prompts(share_of(np.nextafter(DENSE, 1)), answered.prompts, seed),
        latents_half_margin=over_prompts(latents_of(0.5), pair_prompts_N, seed),
        latents_ninety_margin=over_prompts(latents_of(0.9), pair_prompts_N, seed),
        names_auc=_names_auc(named, answered.prompts, seed),
    )


def firing_share(contributions_RS: sparse.csr_array, fires_RS: sparse.csr_array, least: float) -> float:
    """Of all |contributions|, the share of latents that fire on at least the share `least` of the responses; 0 where nothing contributes."""
    size_S = np.asarray(abs(contributions_RS).mean(axis=0)).ravel()
    often_S = np.asarray(fires_RS.mean(axis=0)).ravel() >= least
    total = size_S.sum()
    return float(size_S[often_S].sum() / total) if total > 0 else 0.0


def latents_carrying(margins_NS: sparse.csr_array, part: float) -> int:
    """The fewest latents that together carry this part of the mean absolute contributions to margins; 0 where nothing contributes."""
    size_S = np.sort(np.asarray(abs(margins_NS).mean(axis=0)).ravel())[::-1]
    total = size_S.sum()
    # The last sums may miss the total by a rounding error.
    return int(np.searchsorted(np.cumsum(size_S), part * total * (1 - 1e-12)) + 1) if total > 0 else 0


def named_latents(
    answered: Answered,
    weight_S: Float[np.ndarray, " d_sae"],
    seed: int = 0,
    num: int = NAMED_LATENTS,
    splits: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]] | None = None,
) -> list[Named]:
    """What words say of the latents with the largest mean |w z|; without those that fire on, or are silent on, under 8 responses.

    `splits` are (responses to fit on, responses to rank) of the classifiers; None: folds of the prompts.
    """
    from sklearn.model_selection import GroupKFold

    size_S = np.asarray(abs(_contributions(answered.values, weight_S)).mean(axis=0)).ravel()
    fires_RS = sparse.csc_array(answered.values != 0)
    num_prompts = len(np.unique(answered.prompts))
    if num_prompts < 2:
        return []
    texts = np.array(answered.texts, dtype=object)
    if splits is None:
        folds = GroupKFold(min(_FOLDS, num_prompts), shuffle=True, random_state=seed)
        splits = list(folds.split(texts, groups=answered.prompts))
    named = []
    for latent in np.argsort(-size_S, kind="stable")[:num]:
        fires_R = fires_RS[:, [latent]].toarray().ravel()
        if size_S[latent] > 0 and min(fires_R.sum(), (~fires_R).sum()) >= _FEWEST:
            named += [one] if (one := _named(int(latent), texts, fires_R, splits)) else []
    return named


def _named(
    latent: int, texts: NDArray[np.object_], fires_R: NDArray[np.bool_], splits: Sequence[tuple[Any, Any]]
) -> Named | None:
    from sklearn.metrics import roc_auc_score

    scores_R = np.full(len(texts), np.nan)
    for train, test in splits:
        if 0 < fires_R[train].sum() < len(train) and (words := _WordClassifier.fitted(texts[train], fires_R[train])):
            scores_R[test] = words.scores(texts[test])
    known_R = np.isfinite(scores_R)
    everything = _WordClassifier.fitted(texts, fires_R)
    if everything is None or not 0 < fires_R[known_R].sum() < known_R.sum():
        return None
    auc = float(roc_auc_score(fires_R[known_R], scores_R[known_R]))
    return Named(latent, auc, everything.terms(TERMS_SHOWN), scores_R, fires_R)


def _says_something(term: str) -> bool:
    """Whether a term has more than function words. A reader learns nothing from "the" and "they are", but from "cannot"."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return any(word not in ENGLISH_STOP_WORDS or word in _NEGATIONS for word in term.split())


class _WordClassifier:
    """Logistic regression on the words and word pairs of a text, by TF-IDF."""

    def __init__(self, words: Any, regression: Any):
        self._words, self._regression = words, regression

    @classmethod
    def fitted(cls, texts: NDArray[np.object_], fires_R: NDArray[np.bool_]) -> "_WordClassifier | None":
        """None where the texts have no word in common."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        try:
            terms = words.fit_transform(texts)
        except ValueError:
            return None
        return cls(words, LogisticRegression(C=3.0, class_weight="balanced", max_iter=300).fit(terms, fires_R))

    def scores(self, texts: NDArray[np.object_]) -> NDArray[np.float64]:
        """Log-odds that the latent fires, but for a constant."""
        scores_R: NDArray[np.float64] = self._regression.decision_function(self._words.transform(texts))
        return scores_R

    def terms(self, num: int) -> tuple[str, ...]:
        """The terms of the largest positive weights."""
        weights, names = self._regression.coef_[0], self._words.get_feature_names_out()
        order = [int(place) for place in np.argsort(-weights, kind="stable") if weights[place] > 0]
        found = [str(names[place]) for place in order]
        return tuple([name for name in found if _says_something(name)][:num] or found[:num])


def _names_auc(named: Sequence[Named], prompts_R: NDArray[np.generic], seed: int) -> Estimate | None:
    """The mean AUC over latents; its interval is over prompts, the classifiers staying as they are."""
    from sklearn.metrics import roc_auc_score

    if not named:
        return None

    def mean_auc(rows: NDArray[np.int64]) -> float:
        aucs = []
        for one in named:
            scores, fires = one.scores[rows], one.fires[rows]
            known = np.isfinite(scores)
            if 0 < fires[known].sum() < known.sum():
                aucs.append(roc_auc_score(fires[known], scores[known]))
        return float(np.mean(aucs)) if aucs else float("nan")

    return over_prompts(mean_auc, prompts_R, seed)


def over_prompts(
    statistic: Callable[[NDArray[np.int64]], float],
    prompts: NDArray[np.generic],
    seed: int,
    resamples: int = _RESAMPLES,
) -> Estimate:
    """A figure of rows, and its percentile interval when prompts, with all their rows, are drawn anew; none for fewer than two prompts."""
    _, place = np.unique(prompts, return_inverse=True)
    rows_of = np.split(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place))[:-1])
    value = statistic(np.arange(len(prompts)))
    if len(rows_of) < 2:
        return Estimate(value, None)

    def drawn(clusters: NDArray[np.int64]) -> float:
        return statistic(np.concatenate([rows_of[cluster] for cluster in clusters]))

    found = stats.bootstrap(
        (np.arange(len(rows_of)),), drawn, vectorized=False, method="percentile", n_resamples=resamples, rng=np.random.default_rng(seed)
    ).confidence_interval  # fmt: skip
    ends = float(found.low), float(found.high)
    return Estimate(value, ends if np.isfinite(ends).all() else None)


def _contributions(values_RS: sparse.csr_array, weight_S: Float[np.ndarray, " d_sae"]) -> sparse.csr_array:
    return sparse.csr_array(values_RS.multiply(np.asarray(weight_S, dtype=np.float64)[None, :]))
