"""Sources of texts and of pairs that are known by name: those made in code, and the sizes of some public data sets. One entry each.

Only what a source reads imports what it needs, so that help and dry runs can name the sources and their sizes at once.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sarm.data.sources.rows import Reject

CHARACTERS_A_TOKEN = 4.4
TOKENS_A_SENTENCE = 20
# In 17,103,059 documents, as its makers count them.
_OPENWEBTEXT2_BYTES = 65.86e9


class TextSource(NamedTuple):
    """A source of texts by its numbers of texts, tokens and sentences; `read` gives the texts where they are made in code."""

    rows: float
    tokens: float
    sentences: float
    read: Callable[[], Iterable[str]] | None = None


class PairSource(NamedTuple):
    """A source of pairs by their number and the tokens of a pair (assumed for data sets); `read` gives the rows where they are made in code."""

    rows: float
    tokens_a_pair: float
    read: "Callable[[], Iterable[dict[str, Any] | Reject]] | None" = None


def _openwebtext() -> Iterator[str]:
    from sarm.data.sources.demo import demo_texts

    return demo_texts("openwebtext")


def _wikipedia() -> Iterator[str]:
    from sarm.data.sources.demo import demo_texts

    return demo_texts("wikipedia")


def _answers() -> "Iterator[list[dict[str, str]]]":
    from sarm.data.sources.demo import demo_answers

    return demo_answers()


def _tiny_texts() -> Iterator[str]:
    from sarm.data.sources.tiny import tiny_texts

    return tiny_texts()


def _harm() -> "Iterator[dict[str, Any] | Reject]":
    from sarm.data.sources.demo import demo_pairs

    return demo_pairs()


def _tiny_pairs() -> Iterator[dict[str, Any]]:
    from sarm.data.sources.tiny import tiny_pairs

    return tiny_pairs()


TEXT_SOURCES: dict[str, TextSource] = {
    "demo:openwebtext": TextSource(1000, 145_000, 4_800, _openwebtext),
    "demo:wikipedia": TextSource(1000, 145_000, 4_800, _wikipedia),
    "tiny:texts": TextSource(200, 16_000, 1_130, _tiny_texts),
    "hf:segyges/OpenWebText2": TextSource(
        17_103_059,
        _OPENWEBTEXT2_BYTES / CHARACTERS_A_TOKEN,
        _OPENWEBTEXT2_BYTES / CHARACTERS_A_TOKEN / TOKENS_A_SENTENCE,
    ),
}
# Conversations, of which the last turns are taken.
RESPONSE_SOURCES: dict[str, Callable[[], Iterable[list[dict[str, str]]]]] = {"demo:answers": _answers}
PAIR_SOURCES: dict[str, PairSource] = {
    "demo:harm": PairSource(1715, 51, _harm),
    "tiny:pairs": PairSource(120, 105, _tiny_pairs),
    "hf:Skywork/Skywork-Reward-Preference-80K-v0.2": PairSource(77_000, 1000),
    "hf:PKU-Alignment/PKU-SafeRLHF": PairSource(74_000, 300),
}
BUILT_IN_TEXTS = {name: source.read for name, source in TEXT_SOURCES.items() if source.read is not None}
BUILT_IN_PAIRS = {name: source.read for name, source in PAIR_SOURCES.items() if source.read is not None}
