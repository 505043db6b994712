"""Which texts a latent is explained from, chosen by and tested on. Every choice is by hash: the same folder gives the same samples.

Prompts are split by hash before anything is looked at: `explain`, `select`, `test`. No prompt, and no text that occurs under several
prompts, is in two of them, which is asserted for every latent.

Texts where a latent is silent are of four kinds: `paired` (the other answer to the prompt of a text where it fires: same topic),
`neighbour` (fires the latents that fire most often with it), `lexical` (nearest by TF-IDF), `random` (of like length).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from jaxtyping import Bool, Float64, Int
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from sarm.contracts.ids import hash_share
from sarm.interpret.questions import MAX_ACTIVATION, Shown

SPLITS = {"explain": 0.4, "select": 0.6, "test": 1.0}
"""Where each split ends on the line of hashes."""
NEGATIVES = ("paired", "neighbour", "lexical", "random")
_NUM_NEIGHBOURS = 10


def split_of(prompt_hash: str) -> str:
    """The split of a prompt, by its hash alone."""
    share = hash_share(f"interpret:{prompt_hash}")
    return next(name for name, end in SPLITS.items() if share < end)


@dataclass(frozen=True)
class Example:
    """One text of one latent. `kind` is `fires` or one of NEGATIVES; `activation` is 0 where it is silent."""

    text_id: str
    prompt_hash: str
    prompt: str
    text: str
    kind: str
    activation: float
    span: str = ""
    decile: int = -1
    pair_id: str | None = None
    side: str = ""

    @property
    def fires(self) -> bool:
        return self.kind == "fires"

    def shown(self, largest: float | None = None) -> Shown:
        """As judges see it; with its level from 0 to 10 if the latent's largest activation is given."""
        if largest is None:
            return Shown(self.prompt, self.text)
        return Shown(self.prompt, self.text, self.span, level(self.activation, largest))


@dataclass(frozen=True)
class Samples:
    """What one latent is explained and tested with."""

    latent: int
    largest: float
    explain: Sequence[Sequence[Example]]
    """One set for each candidate explanation."""
    select: Sequence[Example]
    test: Sequence[Example]
    intruders: Sequence[tuple[Sequence[Example], int]]
    """Sets of texts with the number, from 1, of the one where the latent is silent."""


def level(activation: float, largest: float) -> int:
    """ceil(10 a / max), between 0 and 10."""
    return int(min(MAX_ACTIVATION, max(0, np.ceil(MAX_ACTIVATION * activation / largest)))) if largest > 0 else 0


class Pool:
    """All texts of one place, and which latents fire in each; n texts, S latents.

    `silence_is_known` is False if a text's latents were put together from the latents' contexts, which are samples: a latent that
    a text is not a context of may then still fire there.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], silence_is_known: bool):
        self.rows, self.silence_is_known = rows, silence_is_known
        latents = np.array([i for row in rows for i in row["latents"]], dtype=np.int64)
        texts = np.repeat(np.arange(len(rows)), [len(row["latents"]) for row in rows])
        values = np.array([v for row in rows for v in row["values"]], dtype=np.float64)
        width = int(latents.max()) + 1 if len(latents) else 0
        self._fires = sp.csc_matrix((values, (texts, latents)), shape=(len(rows), width))
        norms = np.sqrt(np.asarray(self._fires.multiply(self._fires).sum(axis=0)).ravel())
        self._unit = self._fires @ sp.diags(1 / np.where(norms > 0, norms, 1.0)) if width else self._fires
        self._splits = np.array([split_of(row["prompt_hash"]) for row in rows])
        self._lengths = np.array([len(row["text"]) for row in rows])
        self._order = np.array(sorted(range(len(rows)), key=lambda i: hash_share(rows[i]["text_id"])), dtype=np.intp)
        self._sides: dict[str | None, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            if row["pair_id"] is not None:
                self._sides[row["pair_id"]].append(place)
        try:
            self._words = TfidfVectorizer(sublinear_tf=True).fit([row["text"] for row in rows])
            self._tfidf = self._words.transform([row["text"] for row in rows])
        except ValueError:
            self._words = None

    @classmethod
    def of_contexts(cls, contexts: pa.Table) -> "Pool":
        """The texts of contexts.parquet (of one place) with the latents whose contexts they are."""
        rows: dict[str, dict[str, Any]] = {}
        for one in contexts.to_pylist():
            row = rows.setdefault(one["text_id"], {**one, "found": {}})
            row["found"][one["latent"]] = one["activation"]
        for row in rows.values():
            row["latents"], row["values"] = list(row["found"]), list(row["found"].values())
        return cls([rows[text_id] for text_id in sorted(rows)], silence_is_known=False)

    def negatives(self, latent: int, split: str, positives: Sequence[Example], num: int) -> list[Example]:
        """At most `num` texts of each kind where the latent is silent; none twice, none that equals a positive."""
        free_N = (self._splits == split) & ~(self._column(latent) > 0)
        taken = {one.text for one in positives}
        found: list[Example] = []
        for kind in NEGATIVES:
            added = 0
            for i in self._ranked(kind, latent, free_N, positives) if positives else ():
                if added == num:
                    break
                if (text := self.rows[i]["text"]) not in taken:
                    taken.add(text)
                    found.append(self._example(i, kind))
                    added += 1
        return found

    def _ranked(
        self, kind: str, latent: int, free_N: Bool[NDArray[np.bool_], " texts"], positives: Sequence[Example]
    ) -> Iterable[int]:
        """Places of free texts, the best of a kind first."""
        if kind == "paired":
            partners = [(i, one.side) for one in positives for i in self._sides.get(one.pair_id, ())]
            return [i for i, side in partners if free_N[i] and self.rows[i]["side"] != side]
        # One order by hash for all latents, begun at another place by each: hashing every text for every latent would take hours.
        start = int(len(self._order) * hash_share(f"{latent}:{kind}"))
        order = np.concatenate([self._order[start:], self._order[:start]])
        free = order[free_N[order]]
        if kind == "neighbour":
            return self._firing_neighbours(latent, free)
        if kind == "lexical":
            if self._words is None or not len(free):
                return []
            near = (self._tfidf[free] @ self._words.transform([one.text for one in positives]).T).max(axis=1)
            near_F = np.asarray(near.todense()).ravel()
            best = np.argsort(-near_F, kind="stable")
            found: list[int] = free[best[near_F[best] > 0]].tolist()
            return found
        # Of a few at random, the one whose length is nearest to that of a positive.
        lengths = [len(one.text) for one in positives]
        picks = []
        for place, first in enumerate(range(0, min(len(free), 8 * 64), 8)):
            group = free[first : first + 8].tolist()
            picks.append(min(group, key=lambda i: abs(int(self._lengths[i]) - lengths[place % len(lengths)])))
        # The others follow, for where the first are taken by another kind.
        return list(dict.fromkeys([*picks, *free.tolist()]))

    def _firing_neighbours(self, latent: int, free: Int[NDArray[np.intp], " free"]) -> list[int]:
        if latent >= self._fires.shape[1]:
            return []
        cosine_S = np.asarray((self._unit.T @ self._unit[:, [latent]]).todense()).ravel()
        cosine_S[latent] = 0
        ranked: list[int] = []
        for other in np.argsort(-cosine_S, kind="stable")[:_NUM_NEIGHBOURS]:
            if cosine_S[other] > 0:
                value_N = self._column(int(other))
                firing = free[value_N[free] > 0]
                ranked += firing[np.argsort(-value_N[firing], kind="stable")].tolist()
        return list(dict.fromkeys(ranked))

    def _column(self, latent: int) -> Float64[NDArray[np.float64], " texts"]:
        if latent >= self._fires.shape[1]:
            return np.zeros(len(self.rows))
        return np.asarray(self._fires[:, [latent]].todense()).ravel()

    def _example(self, i: int, kind: str) -> Example:
        row = self.rows[i]
        return Example(text_id=row["text_id"], prompt_hash=row["prompt_hash"], prompt=row["prompt"], text=row["text"], kind=kind, activation=0.0, pair_id=row["pair_id"], side=row["side"])  # fmt: skip


def positives_of(contexts: Sequence[Mapping[str, Any]]) -> list[Example]:
    """Contexts of one latent and place as examples, strongest first; a text counts once."""
    found: dict[str, Example] = {}
    for row in sorted(contexts, key=lambda row: (-row["activation"], row["text_id"])):
        start, end = row["span_start"], row["span_end"]
        span = row["text"][start:end] if 0 <= start < end <= len(row["text"]) else ""
        known = found.get(row["text"])
        decile = max(row["decile"], known.decile if known else -1)
        first = known or Example(text_id=row["text_id"], prompt_hash=row["prompt_hash"], prompt=row["prompt"], text=row["text"], kind="fires", activation=row["activation"], span=span, decile=-1, pair_id=row["pair_id"], side=row["side"])  # fmt: skip
        found[row["text"]] = Example(**{**first.__dict__, "decile": decile})
    return list(found.values())


def draw_samples(
    latent: int,
    contexts: Sequence[Mapping[str, Any]],
    largest: float,
    pool: Pool,
    *,
    num_explain: int,
    num_test: int,
    num_negatives: int,
    candidates: int,
    intruder_trials: int,
) -> Samples:
    """The samples of a latent. Raises AssertionError if a prompt or a text is in two splits."""
    by_split: dict[str, list[Example]] = {name: [] for name in SPLITS}
    for one in positives_of(contexts):
        by_split[split_of(one.prompt_hash)].append(one)
    explain = [_mixed(latent, c, by_split["explain"], num_explain) for c in range(candidates)]
    seen = {one.text for sample in explain for one in sample}
    chosen: dict[str, list[Example]] = {}
    for split, num in (("select", max(2, num_test // 2)), ("test", num_test)):
        fires = _spread(latent, split, [one for one in by_split[split] if one.text not in seen], num)
        silent = [one for one in pool.negatives(latent, split, fires, num_negatives) if one.text not in seen]
        chosen[split] = sorted([*fires, *silent], key=lambda one: _key(latent, "order", one.text_id))
        seen |= {one.text for one in chosen[split]}
    samples = Samples(latent=latent, largest=largest, explain=explain, select=chosen["select"], test=chosen["test"], intruders=_intruders(latent, chosen["test"], intruder_trials))  # fmt: skip
    check_disjoint(samples)
    return samples


def check_disjoint(samples: Samples) -> None:
    """Raise AssertionError if a prompt or a text is in two of explain, select and test."""
    splits = ([one for sample in samples.explain for one in sample], samples.select, samples.test)
    for field in ("prompt_hash", "text_id", "text"):
        sets = [{getattr(one, field) for one in split} for split in splits]
        assert sum(map(len, sets)) == len(set().union(*sets)), f"latent {samples.latent}: a {field} is in two splits"


def _mixed(latent: int, candidate: int, positives: Sequence[Example], num: int) -> list[Example]:
    """A quarter are the strongest, the rest from all deciles; another draw for each candidate."""
    strongest = list(positives[: max(1, num // 4)])
    rest = _spread(latent, f"explain{candidate}", positives[len(strongest) :], num - len(strongest))
    return sorted([*strongest, *rest], key=lambda one: -one.activation)


def _spread(latent: int, salt: str, positives: Sequence[Example], num: int) -> list[Example]:
    """At most `num`, in turn from each decile, and of a prompt that was used before only when the others are used up."""
    by_hash = sorted(positives, key=lambda one: _key(latent, salt, one.text_id))
    of_prompt: Counter[str] = Counter()
    of_decile: Counter[tuple[int, int]] = Counter()
    ranks = {}
    for one in by_hash:
        of_prompt[one.prompt_hash] += 1
        of_decile[(of_prompt[one.prompt_hash], one.decile)] += 1
        ranks[one.text_id] = (of_prompt[one.prompt_hash], of_decile[(of_prompt[one.prompt_hash], one.decile)])
    return sorted(by_hash, key=lambda one: ranks[one.text_id])[:num]


def _intruders(latent: int, test: Sequence[Example], trials: int) -> list[tuple[list[Example], int]]:
    """Sets of four texts where the latent fires, the strongest first, and one at random where it does not."""
    fires = sorted((one for one in test if one.fires), key=lambda one: -one.activation)
    silent = [one for one in test if one.kind == "random"]
    sets = []
    for trial in range(min(trials, len(fires) // 4, len(silent))):
        four = fires[4 * trial : 4 * trial + 4]
        place = int(5 * hash_share(f"{latent}:{trial}:intruder"))
        sets.append(([*four[:place], silent[trial], *four[place:]], place + 1))
    return sets


def _key(latent: int, salt: str, text_id: str) -> float:
    return hash_share(f"{latent}:{salt}:{text_id}")
