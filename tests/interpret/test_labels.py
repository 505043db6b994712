"""Labels from terms: what is planted is found, what is everywhere is not, and nothing is claimed of nothing."""

import math

from sarm.interpret.labels import NO_TERMS, Background, label, labels

TEXTS = [
    f"the {animal} sat on the {place} and looked at the {thing}"
    for animal in ("cat", "dog", "hen", "cow", "fox")
    for place in ("mat", "roof", "wall")
    for thing in ("moon", "sun", "rain", "road")
]


def test_labels_are_the_terms_that_set_a_latents_texts_apart():
    plain = [f"the weather of day {i} was a fine one and the sea was calm" for i in range(30)]
    planted = [f"the {word} was a red herring and the sea was calm" for word in ("first", "second", "third", "fourth")]
    found = labels({1: planted, 2: plain[:4]}, plain)
    assert "red herring" in [term.term for term in found[1]]
    assert found[1][0].share == 1.0
    assert label(Background(plain).characteristic(plain[:1])) == "no characteristic terms"


def test_the_planted_word_leads_and_common_words_are_left_out():
    terms = [one.term for one in Background(TEXTS).characteristic([text for text in TEXTS if "fox" in text])]
    assert "fox" in terms[0]
    assert not {"the", "sat", "and"} & set(terms)
    words = [word for term in terms for word in term.split()]
    assert len(words) == len(set(words)), "a word of a chosen pair is named twice"


def test_a_random_sample_and_no_texts_have_no_terms():
    background = Background(TEXTS)
    assert label(background.characteristic(TEXTS[::7])) == NO_TERMS
    assert label(background.characteristic([])) == NO_TERMS
    assert label(Background(["!", "?"]).characteristic(["!"])) == NO_TERMS


def test_repeating_a_text_changes_nothing():
    texts = [text for text in TEXTS if "roof" in text]
    assert Background(TEXTS).characteristic(texts) == Background(TEXTS).characteristic(texts * 5)


def test_the_score_by_hand():
    """`fox` is in 12 of 12 texts and in none of the 48 others."""
    found = Background(TEXTS).characteristic([text for text in TEXTS if "fox" in text])
    one = next(term for term in found if "fox" in term.term)
    odds = math.log(12.5 / 0.5) - math.log(0.5 / 48.5)
    assert math.isclose(one.score, odds / math.sqrt(1 / 12.5 + 1 / 0.5 + 1 / 0.5 + 1 / 48.5))
    assert one.share == 1.0
