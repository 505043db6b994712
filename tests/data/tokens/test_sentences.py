from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.data.tokens.sentences import sentence_end_tokens, sentence_ends


def sentences(text: str) -> list[str]:
    """The sentences as strings; what is left behind the last end comes last, marked with a bar."""
    parts, start = [], 0
    for end in sentence_ends(text):
        parts.append(text[start : end + 1].strip())
        start = end + 1
    return parts + ([f"|{text[start:].strip()}"] if text[start:].strip() else [])


def test_an_end_is_the_index_of_the_last_character():
    assert sentence_ends("Hi. Yes!") == [2, 7]


def test_stops_end_sentences():
    assert sentences("It rains. Really? Yes! Good.") == ["It rains.", "Really?", "Yes!", "Good."]


def test_rarer_stops_and_spaces_of_no_width_are_known():
    assert sentences("What‽ Really⁉ So⁈ Yes‼ Good.") == ["What‽", "Really⁉", "So⁈", "Yes‼", "Good."]
    assert sentences("全角．次の文．") == ["全角．", "次の文．"]
    assert sentences("Τι κάνεις\u037e Καλά.") == ["Τι κάνεις\u037e", "Καλά."]
    assert sentence_ends("One.\u200bTwo.\ufeffThree.") == [3, 8, 15]
    assert sentence_ends("He met Mr.\u200bHill.") == [15]


def test_runs_of_stops_end_one_sentence():
    assert sentences("What?! No!!! Fine.") == ["What?!", "No!!!", "Fine."]


def test_closing_quotes_and_brackets_belong_to_the_sentence():
    assert sentences('He said "no." (She left.) Then “yes.” Done.[1] **Bold.** End.') == [
        'He said "no."',
        "(She left.)",
        "Then “yes.”",
        "Done.[1]",
        "**Bold.**",
        "End.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Mr. and Mrs. Hill met Dr. Wood in St. Louis.",
        "Bring fruit, e.g. apples, i.e. something fresh.",
        "The U.S. Senate met at 9 a.m. on Jan. 5.",
        "J. K. Rowling wrote it with J. A. Smith and J.R.R. Tolkien.",
        "Tea, milk, etc. were sold by Hill Inc. of Ohio.",
        "See Fig. 3 and no. 5 on p. 12.",
        "Pi is 3.14 and not 3.15 or .5 at all.",
        "Look at https://a.example.org/b.html?c=1.2 or www.example.com/x!y now.",
        "Open notes.txt and main.py, then numpy.array in v1.2.3 here.",
        "He left... slowly, and then… he came back.",
        '"Really?" she asked.',
        "Dr.\nHill wrapped his lines.",
    ],
)
def test_these_stops_are_inside_a_sentence(text):
    assert sentences(text) == [text]


def test_abbreviations_end_a_sentence_before_a_word_that_starts_one():
    assert sentences("He moved to the U.S. Then he left. Nuts, etc. The end.") == [
        "He moved to the U.S.",
        "Then he left.",
        "Nuts, etc.",
        "The end.",
    ]


def test_an_ellipsis_before_a_capital_ends_a_sentence():
    assert sentences("We waited... Nobody came.") == ["We waited...", "Nobody came."]


def test_other_scripts_need_no_space():
    assert sentences("一。二！三？」四。यह है। ठीक।") == ["一。", "二！", "三？」", "四。", "यह है।", "ठीक।"]


def test_a_blank_line_ends_a_sentence_and_a_single_newline_does_not():
    assert sentences("A heading\n \nSome words\nmore words.\r\n\r\nEnd.") == [
        "A heading",
        "Some words\nmore words.",
        "End.",
    ]


def test_an_unfinished_tail_is_no_sentence():
    assert sentences("Done. And then we") == ["Done.", "|And then we"]
    assert sentence_ends("no stop at all") == []
    assert sentence_ends("") == []


def test_a_sentence_has_a_word():
    assert sentence_ends(" ... !!! * * *\n\n") == []
    assert sentences("Fine. . . . More.") == ["Fine.", ". . . More."]


def test_list_numbers_are_no_sentences():
    assert sentences("1. Mix.\n2. Bake.") == ["1. Mix.", "2. Bake."]


TEXTS = st.text(st.sampled_from("ab AZ19.!?…。\"'”)(\n\r\t[]*\x85\u2028é👍"), max_size=80) | st.text()


@given(TEXTS)
def test_ends_increase_inside_the_text_and_never_fall_on_space(text):
    ends = sentence_ends(text)
    assert ends == sorted(set(ends))
    assert all(0 <= end < len(text) and not text[end].isspace() for end in ends)


@given(TEXTS)
def test_pieces_between_ends_have_a_word_each_and_make_up_the_text(text):
    bounds = [0, *(end + 1 for end in sentence_ends(text))]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    assert "".join(pieces) + text[bounds[-1] :] == text
    assert all(any(c.isalnum() or c == "_" for c in piece) for piece in pieces)


@given(TEXTS)
def test_what_follows_a_paragraph_does_not_change_its_ends(text):
    ends = sentence_ends(text + "\n\nNext one.")
    assert sentence_ends(text + "\n\n" + "Next one. And more.")[: len(ends)] == ends


@pytest.mark.parametrize("unit", ['("', "Mr. ", "“a. ", ". ", "\n ", "a.", '"', " ", "[1]. "])
def test_long_odd_texts_take_linear_time(unit):
    # A quadratic scan of a megabyte would run into the test's time limit.
    assert len(sentence_ends(unit * (1_000_000 // len(unit)))) <= 1_000_000


def test_a_token_that_covers_the_stop_and_more_is_the_end_token():
    #        Hi  ."  next .\n\n
    offsets = [(0, 2), (2, 4), (4, 9), (9, 12)]
    assert sentence_end_tokens([3, 9], offsets) == [1, 3]


def test_two_ends_in_one_token_count_once():
    assert sentence_end_tokens([1, 3], [(0, 4), (4, 6)]) == [0]


def test_of_byte_tokens_that_share_a_character_the_last_counts():
    assert sentence_end_tokens([1], [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]) == [3]


def test_special_tokens_cover_nothing():
    assert sentence_end_tokens([0, 2], [(0, 0), (0, 1), (0, 0), (1, 3), (0, 0)]) == [1, 3]


def test_ends_behind_the_last_token_and_in_gaps_are_left_out():
    assert sentence_end_tokens([1, 3, 9], [(0, 2), (4, 6)]) == [0]
    assert sentence_end_tokens([5], []) == []
    assert sentence_end_tokens([], [(0, 2)]) == []


@given(st.lists(st.integers(1, 4), max_size=20), st.sets(st.integers(0, 60)))
def test_end_tokens_agree_with_a_search_over_all_tokens(widths, ends):
    stops = [sum(widths[: i + 1]) for i in range(len(widths))]
    offsets = [(stop - width, stop) for stop, width in zip(stops, widths, strict=True)]
    slow = {i for end in ends for i, (a, b) in enumerate(offsets) if a <= end < b}
    assert sentence_end_tokens(sorted(ends), offsets) == sorted(slow)
