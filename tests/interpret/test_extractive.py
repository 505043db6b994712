"""Labels from terms: what is planted is found, what is everywhere is not, and nothing is claimed of nothing."""

from sarm.interpret.extractive import NO_TERMS, ExtractiveLabels

BACKGROUND = [
    f"the {animal} sat on the {place} and looked at the {thing}"
    for animal in ("cat", "dog", "hen", "cow", "fox")
    for place in ("mat", "roof", "wall")
    for thing in ("moon", "sun", "rain", "road")
]


def test_the_planted_word_leads_and_common_words_are_left_out():
    contexts = [text for text in BACKGROUND if "fox" in text]
    terms = ExtractiveLabels(BACKGROUND).terms(contexts)
    assert "fox" in terms[0]
    assert not {"the", "sat", "and"} & set(terms)


def test_a_word_of_a_chosen_pair_is_not_named_twice():
    terms = ExtractiveLabels(BACKGROUND).terms([text for text in BACKGROUND if "fox" in text])
    words = [word for term in terms for word in term.split()]
    assert len(words) == len(set(words))


def test_a_random_sample_of_the_background_and_no_contexts_have_no_terms():
    labels = ExtractiveLabels(BACKGROUND)
    assert labels.label(BACKGROUND[::7]) == NO_TERMS
    assert labels.label([]) == NO_TERMS
    assert ExtractiveLabels([]).label(["anything"]) == NO_TERMS
    assert ExtractiveLabels(["!", "?"]).label(["!"]) == NO_TERMS


def test_repeating_a_context_changes_nothing():
    contexts = [text for text in BACKGROUND if "roof" in text]
    labels = ExtractiveLabels(BACKGROUND)
    assert labels.terms(contexts) == labels.terms(contexts * 5)


def test_z_by_hand():
    """Two texts of four have `b`; so do both contexts: A=10, sum of counts 6 (a: 4 texts, b: 2)."""
    import numpy as np

    labels = ExtractiveLabels(["aa", "aa", "aa bb cc", "aa dd bb"])
    i = list(labels._names).index("bb")
    prior = 10 * 2 / labels._background_V.sum()
    own = np.log((2 + prior) / (0 + 10 - prior))
    rest = np.log((2 + prior) / (2 + 10 - prior))
    expected = (own - rest) / np.sqrt(1 / (2 + prior) + 1 / (2 + prior))
    y = np.where(labels._names == "bb", 2.0, 0.0)
    assert np.isclose(labels._z(y, 2)[i], expected)
