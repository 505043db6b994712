"""Where sentences end, by rules in one linear scan.

No library is used: pysbd needs 3 ms a passage, and sentencex, fast and accurate, panics on U+0085 and U+2028 and is quadratic in unclosed quotes.
A missed end costs one activation and a false one gives an activation in mid-sentence, so doubt means no end.
"""

import bisect
import re
from collections.abc import Sequence

# A run of stops with the quotes, brackets, emphasis and footnote marks that close behind it; or a blank line.
_STOP = re.compile(
    r"""(?P<stop>[.!?…‽⁇⁈⁉‼]+|[。！？．｡।॥؟۔։።။\u037e]+)(?P<close>(?:["'”’»)\]}」』】〉》*_`]|\[\d{1,3}\])*)|(?P<blank>\n[^\S\n]*\n)"""
)
_PUNCTUATION = re.compile(r"[.,?!;\n](?:\s*[.,?!;\n])*")
_FOREIGN_STOPS = frozenset("。！？．｡।॥؟۔։።။\u037e")
_QUOTES = frozenset("\"'”’»)")
_WORD = re.compile(r"\w")
# Characters of no width stand where a space could.
_NO_WIDTH = "\u200b\u2060\ufeff"
_NOT_SPACE = re.compile(rf"[^\s{_NO_WIDTH}]")
_OPENING = "\"'“‘«([{*_"

# Longest look back or ahead for a word: longer "words" are no abbreviations.
_REACH = 24


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Something always follows these.
_NEVER_LAST = _words(
    "mr mrs ms dr prof gen sen rep gov lt col capt sgt cmdr maj rev hon pres st mt messrs mme mlle "
    "e.g i.e eg ie cf vs viz ca approx incl ff fig figs eq eqs sec ch vol pp ed eds al"
)
# These only stand before a number: "No. 5", and otherwise they are words.
_BEFORE_NUMBER = _words("no nos art p pg par")
# These may end a sentence: they do so where the next word is one that sentences often start with.
_MAYBE_LAST = _words(
    "etc inc ltd co corp bros jr sr dept est ave blvd rd "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun"
)
_DOTTED = re.compile(r"(?:[^\W\d_]{1,3}\.)+[^\W\d_]{1,3}")
_STARTERS = _words(
    "the a an this that these those he she it they we i you his her its their our my your in on at by for from with "
    "as if when while after before since although though however but and so then there here what who where why how "
    "not no yes some many most all both each every one another"
)


def sentence_ends(text: str) -> list[int]:
    """Index of the last character of each sentence, increasing; closing quotes and brackets belong to the sentence.

    Stops (`.` `!` `?` and their ligatures, CJK, Indic, Arabic, Armenian, Ethiopic, Burmese ones and the Greek question mark) end a sentence unless they sit in an abbreviation, initial, number,
    address, file name or ellipsis; so does a blank line. A tail without a stop is not a sentence. Time is linear in the text.
    """
    ends: list[int] = []
    word = _next_word(text, 0)
    for match in _STOP.finditer(text):
        # Without a word since the last end this is a rule, a smiley or a spaced ellipsis.
        if word is None or word >= match.start():
            continue
        if match["blank"] is not None:
            last = word + len(text[word : match.start()].rstrip()) - 1
        elif _ends_sentence(text, match):
            last = match.end() - 1
        else:
            continue
        ends.append(last)
        word = _next_word(text, last + 1)
    return ends


def punctuation_ends(text: str) -> list[int]:
    """Index of the last character of every run of `. , ? ! ;` and newlines, white space between them included, as SAFER's code has it.

    Decimals, abbreviations and addresses are cut. Its windows and its gap of five tokens between ends are not reproduced.
    """
    return [match.end() - 1 for match in _PUNCTUATION.finditer(text)]


SPLITTERS = {"rules": sentence_ends, "punctuation": punctuation_ends}
"""How sentences are found, by the names that `extraction.sentence_ends` gives."""


def sentence_end_tokens(ends: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Index of the token that covers each end character, in order, without repeats.

    `offsets` are the tokens' (start, stop) characters as a fast tokenizer gives them; empty spans (special tokens) cover nothing.
    Where several byte tokens share one character the last of them counts; ends that no token covers are left out.
    """
    tokens: list[int] = []
    token = 0
    for end in ends:
        while token < len(offsets) and (offsets[token][1] <= end or offsets[token][0] == offsets[token][1]):
            token += 1
        found = None
        ahead = token
        while ahead < len(offsets) and offsets[ahead][0] <= end:
            if offsets[ahead][1] > end:
                found = token = ahead
            ahead += 1
        if found is not None and (not tokens or tokens[-1] != found):
            tokens.append(found)
    return tokens


def ended_sentences(ends: Sequence[int], tokens: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Number of the sentence that each of these tokens ends: the first that ends in it or behind its beginning."""
    return [bisect.bisect_left(ends, offsets[token][0]) for token in tokens]


def sentence_columns(text: str, offsets: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Token that ends a sentence -> number of the sentence in the text; sentences whose end no token covers have none."""
    ends = sentence_ends(text)
    tokens = sentence_end_tokens(ends, offsets)
    return dict(zip(tokens, ended_sentences(ends, tokens, offsets), strict=True))


def _next_word(text: str, start: int) -> int | None:
    found = _WORD.search(text, start)
    return found.start() if found else None


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    stop, close, behind = match["stop"], match["close"], match.end()
    if stop[0] in _FOREIGN_STOPS:
        return True
    following = text[behind : behind + 1]
    # Scripts without spaces and emoji may follow at once; anything else glued on is a number, an address, a file name.
    if following and not following.isspace() and following not in _NO_WIDTH and following < "\u2e80":
        return False
    ahead = _NOT_SPACE.search(text, behind, behind + _REACH)
    if ahead is None or text.count("\n", behind, ahead.start()) > 1:
        # Behind is the end of the text or of a paragraph, where only a list number ("1.") ends nothing.
        return not (stop == "." and _is_list_number(text, match.start()))
    next_word = text[ahead.start() : ahead.start() + _REACH].lstrip(_OPENING)
    goes_on = next_word[:1].islower()
    if any(mark in stop for mark in "!?‽⁇⁈⁉‼"):
        return not (goes_on and any(letter in _QUOTES for letter in close))
    if len(stop) > 1 or stop == "…":
        return not goes_on
    if goes_on and close:
        return False
    return not _is_abbreviation(text, match.start(), next_word)


def _is_list_number(text: str, dot: int) -> bool:
    line = text[max(0, dot - 8) : dot]
    number = line[line.rfind("\n") + 1 :].strip() if "\n" in line or dot <= 8 else ""
    return number.isdigit()


def _is_abbreviation(text: str, dot: int, next_word: str) -> bool:
    """Whether the dot belongs to the word before it and more of the sentence follows."""
    before = text[max(0, dot - _REACH) : dot]
    parts = before.rsplit(None, 1)
    word = parts[-1].lstrip(_OPENING) if parts and not before[-1].isspace() else ""
    lower = word.lower()
    if lower in _NEVER_LAST or _is_list_number(text, dot):
        return True
    if lower in _BEFORE_NUMBER:
        return next_word[:1].isdigit()
    if (len(word) == 1 and word.isupper()) or lower in _MAYBE_LAST or _DOTTED.fullmatch(word):
        # "A." and "I." are initials themselves: "J. A. Smith".
        starter = re.match(r"[^\W\d_]+(?!\.)", next_word)
        return starter is None or next_word[:1].islower() or starter[0].lower() not in _STARTERS
    return False
