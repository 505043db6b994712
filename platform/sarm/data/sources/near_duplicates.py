"""Prompts that are nearly those of another set: across the split, and between training prompts and a benchmark.

J(a, b) = |A & B| / |A | B|,  A the runs of 5 characters of the normalised text (`schema.normalised`) of all messages but the system's.

MinHash with LSH (Broder 1997; `datasketch`) proposes pairs, and J itself decides, so that none is reported that is not one. 64 bands of 4
rows propose a pair of J = 0.5 with a chance of 98 %, one of J = 0.6 with 99.98 %.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from datasketch import MinHash, MinHashLSH

from sarm.contracts.ids import normalised

SIMILARITY = 0.5
_RUN = 5
_BANDS, _ROWS = 64, 4
# Of a longer prompt its beginning and its end: a hash function of every run of 10 MB would take gigabytes.
_MAX_CHARACTERS = 20_000


class Near(NamedTuple):
    """The most similar prompt of the other set, and the similarity J."""

    prompt_id: str
    similarity: float


def text_of(messages: Sequence[Mapping[str, str]]) -> str:
    """What is compared of a prompt."""
    text = normalised("\n".join(message["content"] for message in messages if message["role"] != "system"))
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else text[:half] + text[-half:]


def similarity(a: str, b: str) -> float:
    """J of two texts as `text_of` gives them; 1 for two empty ones."""
    return _jaccard(_runs(a), _runs(b))


def near_duplicates(prompts: Mapping[str, str], others: Iterable[tuple[str, str]]) -> dict[str, Near]:
    """Of the prompts (id to text) those with a similarity of at least SIMILARITY to one of `others`, with the most similar of them.

    Memory grows with `prompts` alone, so hand the smaller set as these.
    """
    index = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
    runs = {prompt_id: _runs(text) for prompt_id, text in prompts.items()}
    for prompt_id, own in runs.items():
        index.insert(prompt_id, _signature(own))
    found: dict[str, Near] = {}
    for other_id, text in others:
        theirs = _runs(text)
        for prompt_id in index.query(_signature(theirs)):
            near = Near(other_id, _jaccard(runs[prompt_id], theirs))
            # Of equally similar ones that of the smallest id, whatever their order.
            if near.similarity >= SIMILARITY and (
                prompt_id not in found or (-near.similarity, other_id) < (-found[prompt_id].similarity, found[prompt_id].prompt_id)
            ):  # fmt: skip
                found[prompt_id] = near
    return found


def _runs(text: str) -> frozenset[int]:
    raw = [text[start : start + _RUN].encode("utf-8", "surrogatepass") for start in range(max(1, len(text) - _RUN + 1))]
    return frozenset(map(zlib.crc32, raw))


def _signature(runs: frozenset[int]) -> MinHash:
    # 32-bit arithmetic, which is what the hashes of runs have.
    found = MinHash(num_perm=_BANDS * _ROWS, hashfunc=_as_it_is, scheme="affine32")
    found.update_batch(sorted(runs))
    return found


def _as_it_is(run: int) -> int:
    return run


def _jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    return len(a & b) / len(a | b)
