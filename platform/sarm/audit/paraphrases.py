"""Paraphrases: by a few rules that can be undone, and the check of those that a model wrote.

contractions  do not <-> don't, and the like; only forms of `not`, since it's, he'd and their like stand for two things
words         perhaps <-> maybe, therefore <-> thus, ...: words without content that stand for each other in every sentence
clauses       The wall is old; the roof is new. <-> The roof is new; the wall is old.

The normal form is lower case, contracted, with the first word of each two and clauses in alphabetical order. Two texts with one normal form say
the same in the same words but for these rules. Of a paraphrase that a model wrote no rule can say so. Its `facts` are compared instead: numbers,
code, items of lists and links in their order, and about as many words.
"""

import re

_NOT = [
    "do",
    "does",
    "did",
    "is",
    "are",
    "was",
    "were",
    "could",
    "would",
    "should",
    "has",
    "have",
    "had",
    "must",
    "need",
]
_EXPANDED = {f"{word} not": f"{word}n't" for word in _NOT} | {"cannot": "can't", "will not": "won't"}
_SYNONYMS = {
    "perhaps": "maybe",
    "therefore": "thus",
    "among": "amongst",
    "toward": "towards",
    "often": "frequently",
    "usually": "normally",
    "although": "though",
}
# "It is late, though." has no other word.
_ONE_WAY = {"though"}
# Words with which a clause may begin whatever stands before it, and whose capital is that of the sentence alone.
_OPENINGS = [
    "the",
    "a",
    "an",
    "this",
    "that",
    "these",
    "those",
    "you",
    "we",
    "they",
    "he",
    "she",
    "there",
    "some",
    "many",
    "most",
    "it",
    "in",
    "on",
    "at",
]
_WORD = "|".join(re.escape(one) for one in (*_EXPANDED, *_EXPANDED.values()))
_CONTRACTED = {short: long for long, short in _EXPANDED.items()}
_CONTRACTION = re.compile(rf"\b(?:{_WORD})(?![\w'])", re.I | re.A)
_SYNONYM = re.compile(rf"\b(?:{'|'.join((*_SYNONYMS, *_SYNONYMS.values()))})\b", re.I | re.A)
_OTHER = _SYNONYMS | {second: second if second in _ONE_WAY else first for first, second in _SYNONYMS.items()}
_FIRST = {second: first for first, second in _SYNONYMS.items()}
_CLAUSES = re.compile(
    r"(?:^|(?<=[.!?\n]\s)|(?<=\n))([^\s.!?;:\n][^.!?;:\n]*); ([^\s.!?;:\n][^.!?;:\n]*)([.!?])(?=\s|$)"
)
_FACTS = re.compile(r"```.*?```|`[^`\n]+`|https?://\S+|^\s*(?:[-*+•]|\d+[.)])(?=\s)|\d+(?:[.,:/]\d+)*", re.S | re.M)
# Of a paraphrase's words, in those of the text.
_FEWEST, _MOST = 0.6, 1.6


def paraphrased(text: str) -> str:
    """The text with every contraction, word and clause that a rule knows put the other way."""
    text = _CONTRACTION.sub(lambda found: _like(found[0], _turned(found[0].lower())), text)
    text = _SYNONYM.sub(lambda found: _like(found[0], _OTHER[found[0].lower()]), text)
    return _CLAUSES.sub(_swapped, text)


def normal_form(text: str) -> str:
    """What is left of a text when these rules are taken out of it."""
    text = text.lower().replace("’", "'")
    text = _CONTRACTION.sub(lambda found: _EXPANDED.get(found[0], found[0]), text)
    text = _SYNONYM.sub(lambda found: _FIRST.get(found[0], found[0]), text)
    return _CLAUSES.sub(lambda found: f"{'; '.join(sorted((found[1], found[2])))}{found[3]}", text)


def facts(text: str) -> str:
    """What a paraphrase has to keep to the letter, one a line."""
    return "\n".join(found.strip() for found in _FACTS.findall(text))


def keeps_size(text: str, paraphrase: str) -> bool:
    """Whether a paraphrase has about as many words as the text."""
    words, own = len(text.split()), len(paraphrase.split())
    return _FEWEST * words <= own <= _MOST * words + 2


def _turned(word: str) -> str:
    return _EXPANDED.get(word) or _CONTRACTED[word]


def _like(word: str, other: str) -> str:
    """The other word with the first one's capital, if it has one; the word itself where it is in capitals."""
    if word[:1].islower():
        return other
    return word if word[1:].isupper() else other[:1].upper() + other[1:]


def _swapped(found: re.Match[str]) -> str:
    first, second, end = found.groups()
    word, begins = first.split()[0], second.split()[0]
    is_safe = word.lower() in _OPENINGS and word[:1].isupper() and begins in _OPENINGS
    return f"{second[:1].upper()}{second[1:]}; {first[:1].lower()}{first[1:]}{end}" if is_safe else found[0]
