"""The splitter on the labelled sample: precision and recall of sentence ends, which docs/extraction.md quotes."""

from collections.abc import Callable

from tests.data.tokens.sentence_sample import labelled

from sarm.data.tokens.sentences import punctuation_ends, sentence_ends


def quality(splitter: Callable[[str], list[int]], kinds: set[str] | None = None) -> tuple[float, float]:
    """(precision, recall) over all ends of the sample."""
    right = found = wanted = 0
    for kind, text, ends in labelled():
        if kinds is not None and kind not in kinds:
            continue
        own = set(splitter(text))
        right, found, wanted = right + len(own & ends), found + len(own), wanted + len(ends)
    return right / found, right / wanted


def test_the_rules_find_what_a_reader_would():
    precision, recall = quality(sentence_ends)
    assert precision >= 0.95
    assert recall >= 0.95


def test_punctuation_alone_finds_ends_that_are_none():
    precision, recall = quality(punctuation_ends, {"plain", "abbreviations", "numbers", "addresses", "quotes"})
    assert precision < 0.6
    assert recall > 0.7


def test_punctuation_takes_a_run_with_the_white_space_in_it():
    assert punctuation_ends("3.14, yes\n\n!") == [1, 4, 11]
    assert punctuation_ends("no stop") == []
    assert punctuation_ends("a . . b;") == [4, 7]
