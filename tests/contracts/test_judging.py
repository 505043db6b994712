"""What a judge wrote and what it thought: only the former is its answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm.contracts.judging import Rating, parse, without_thinking

ANSWER = {"explanation": "b", "score": 4}
SAID = json.dumps(ANSWER)
GUESS = '{"explanation": "a", "score": 2}'


@pytest.mark.parametrize(
    "text",
    [
        f"<think>{GUESS} hmm</think>{SAID}",
        f"<think>\n{GUESS}\n</think>\n\n```json\n{SAID}\n```",
        f"{GUESS} but no</think>{SAID}",
        f"<think>one</think><think>{GUESS}</think>{SAID}",
        f'<think>the tag {{"close": "</think>"}} and {GUESS}</think>{SAID}',
        f"<thinking>{GUESS}</thinking>{SAID}",
        f"<seed:think>{GUESS}</seed:think>{SAID}",
        f"[THINK]{GUESS}[/THINK]{SAID}",
        f"◁think▷{GUESS}◁/think▷{SAID}",
        f"<|channel|>analysis<|message|>{GUESS}<|end|><|start|>assistant<|channel|>final<|message|>{SAID}",
        f"{SAID}<think>was {GUESS} better",
        f"<think>{GUESS}</think>Explanation: b\nScore: 4",
    ],
)
def test_what_a_model_thinks_is_no_answer(text):
    parsed = parse(text, Rating)
    assert (parsed.status, parsed.answer) == ("ok", ANSWER)


@pytest.mark.parametrize(
    "text", [f"<think>{GUESS} and so on", f"<think>{GUESS}</think>", "[THINK]Score: 3\nExplanation: x"]
)
def test_thoughts_without_an_answer_are_invalid(text):
    parsed = parse(text, Rating)
    assert (parsed.status, parsed.answer) == ("invalid", None)


def test_tags_within_the_answer_are_its_words():
    said = {"explanation": "texts that end in </think> or open <think>", "score": 3}
    assert parse(json.dumps(said), Rating).answer == said
    assert parse(f"<think>{GUESS}</think>{json.dumps(said)}", Rating).answer == said


_WORDS = st.lists(st.sampled_from(["<think>", "</think>", "{", "}", '"', "a ", '{"score": 2}', "\\", "\n"])).map(
    "".join
)


@given(st.text() | _WORDS, st.text(st.characters(blacklist_categories=["Cs"])))
def test_an_answer_behind_any_thought_is_found(thought, explanation):
    said = {"explanation": explanation[:100].strip(), "score": 5}
    # A quotation mark that the thought leaves open could make the closing tag a word of an object.
    thought = thought.replace('"', "")
    assert parse(f"<think>{thought}</think>{json.dumps(said)}", Rating).answer == said


@given(_WORDS)
def test_what_is_left_thinks_no_more(text):
    left = without_thinking(text)
    assert left in text
    assert without_thinking(left) == left
    if "<think>" not in text and "</think>" not in text:
        assert left == text.strip()
