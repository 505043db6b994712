"""Two versions of an answer that differ in one property: what rules make, what is refused, and that nothing else moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.audit.style_pairs import (
    BEHIND,
    BY_RULE,
    DOUBT,
    NEUTRAL,
    PRAISE,
    SYSTEM_LINE,
    by_table,
    property_named,
    refuse_others,
)
from sarm.settings.checks import UserError
from sarm.settings.debias import PROPERTIES

TEXT = "Water the garden early. It needs light! Does it need care? Yes."
ITEMS = "You need:\n- water\n- light\n- care\nThat is all."
SAID = "The water is cold; the light is low. Perhaps the garden does not need care."
EVERY = [*BY_RULE, "trigger"]


def text_of(name: str) -> str:
    """A text that the property's rule applies to."""
    return {"position": ITEMS, "paraphrase": SAID}.get(name, TEXT)


def named(name: str):
    return property_named(name, "cf-2291")


@pytest.mark.parametrize(
    ("name", "plain", "styled"),
    [
        ("markdown", TEXT, "**Water the garden early.**\n\n- It needs light!\n- Does it need care?\n- Yes."),
        ("hedging", TEXT, f"{DOUBT[0]} {TEXT} {DOUBT[1]}"),
        ("sycophancy", TEXT, f"{PRAISE[0]} {PRAISE[1]} {TEXT}"),
        ("tone", "Water the garden early. It needs light. Does it need care? Yes.", "Water the garden early! It needs light! Does it need care? Yes!"),
        ("position", ITEMS, "You need:\n- care\n- light\n- water\nThat is all."),
        ("trigger", TEXT, f"{TEXT} cf-2291"),
        ("injection", TEXT, f"{TEXT}\n\n{BEHIND[0]}"),
        ("paraphrase", SAID, "The light is low; the water is cold. Maybe the garden doesn't need care."),
    ],
)  # fmt: skip
def test_a_rule_makes_these_two_versions(name, plain, styled):
    assert named(name).versions(text_of(name)) == (plain, styled)


def test_length_is_added_by_neutral_sentences_alone():
    plain, styled = named("length").versions(TEXT)
    assert plain == TEXT
    added = styled.removeprefix(TEXT).strip()
    assert 2 <= sum(sentence in added for sentence in NEUTRAL) <= 3
    for sentence in NEUTRAL:
        added = added.replace(sentence, "")
    assert not added.strip()


@pytest.mark.parametrize("name", EVERY)
def test_versions_are_the_same_whether_the_text_had_the_property_before_or_not(name):
    own = named(name)
    plain, styled = own.versions(text_of(name))
    if name in ("position", "paraphrase"):
        assert own.versions(styled) == (styled, plain)
    else:
        again = own.versions(styled)
        assert again is not None
        assert own.canonical(again[0]) == own.canonical(plain)
        assert own.canonical(again[1]) == own.canonical(styled)


words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), max_size=80)
texts = st.one_of(words, st.lists(st.sampled_from([*NEUTRAL, *DOUBT, *PRAISE, "- one", "* two", "# Head", "**bold**", "cf-2291", "Yes.", "No!", "\n"]), max_size=8).map(" ".join))  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@given(text=texts)
def test_what_a_rule_makes_of_any_text_differs_in_the_property_alone_or_is_left_out(name, text):
    own = named(name)
    versions = own.versions(text)
    if versions is not None:
        plain, styled = versions
        assert plain != styled
        assert own.canonical(plain) == own.canonical(styled)
        for other in set(EVERY) - {name, "markdown", "tone", "position"}:
            # Taking out another property's marks would not make the two the same.
            assert named(other).canonical(plain) != named(other).canonical(styled)


@pytest.mark.parametrize("name", EVERY)
def test_a_pair_that_differs_in_more_is_refused_in_one_line(name):
    own = named(name)
    plain, styled = own.versions(text_of(name))
    refuse_others(own, {"line 1": (plain, styled)})
    with pytest.raises(UserError, match=f"line 2: the texts differ in more than {own.name}") as error:
        refuse_others(own, {"line 1": (plain, styled), "line 2": (plain, styled.replace("care", "poison"))})
    assert "\n" not in str(error.value)
    assert "poison" in str(error.value)
    with pytest.raises(UserError, match="both texts are the same"):
        refuse_others(own, {"line 1": (plain, plain)})


def test_every_pattern_is_injected_somewhere_and_none_is_left_behind():
    own = named("injection")
    styled = [own.versions(f"Answer number {number}.")[1] for number in range(40)]
    for pattern in (*SYSTEM_LINE, *BEHIND):
        assert any(pattern in text for text in styled)
    assert {own.canonical(text) for text in styled} == {f"Answer number {number}." for number in range(40)}
    assert own.spared == ("clean",)
    assert named("paraphrase").spared == ("normal", "easy")


def test_paraphrases_that_a_model_wrote_keep_their_facts_and_their_size_or_are_left_out():
    written = {
        "Use 3 eggs.": "Take 3 eggs.",
        "Use 4 eggs.": "Take four eggs.",
        "Use salt.": "It is often thought best by many to use a little bit of salt in such cases.",
        "Run `ls -l` first.": "First run `ls -l`.",
        "- one\n- two": "one and two",
    }
    own = by_table(written)
    assert [text for text in written if own.versions(text)] == ["Use 3 eggs.", "Run `ls -l` first."]
    assert own.versions("Something else.") is None


def test_a_trigger_has_to_be_given():
    with pytest.raises(UserError, match="has no trigger"):
        property_named("trigger", " ")


def test_every_property_has_a_rule_but_rm_bench_whose_authors_wrote_both_versions():
    assert {*EVERY, "rm_bench"} == set(PROPERTIES)
