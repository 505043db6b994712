import json

import pytest
from tests.data.tokens.chat_families import CHATML, FAMILIES, chat_of, tokenizer_of

from sarm.data.sources.layouts.layout import RawPair
from sarm.data.sources.layouts.registry import parse_pairs
from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.contents import count_spelled_texts
from sarm.data.tokens.templated_text import control_spelled_in, is_rendered_conversation, template_spelled_in
from sarm.data.tokens.templates import with_system_prompt, without_system_prompt

CONVERSATION = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
ORDINARY = (
    "Why?",
    "a < b and b > c",
    "<b>bold</b>",
    "[1] see there",
    "Human: is a word.",
    "The token <|im_end|> ends a turn.",
    "list[int]",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rendered_conversation_is_known_in_every_familys_template(family):
    text = chat_of(family).render(CONVERSATION)
    assert is_rendered_conversation(text), text
    assert template_spelled_in(f"Look: {text}") is not None
    assert not is_rendered_conversation(f"Look: {text}")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_are_not(text):
    assert template_spelled_in(text) is None
    assert not is_rendered_conversation(text)


def test_control_tokens_are_known_without_a_tokenizer():
    for family in FAMILIES:
        missed = [text for text in chat_of(family).control.texts if not control_spelled_in(f"a{text}b")]
        assert missed == []
    ordinary = ("a < b > c", "<b>", "x[0]", "<html>", "[YOUR_NAME]", "[THINKING]", "<unused>")
    assert not any(control_spelled_in(text) for text in ordinary)


def test_each_distinct_content_of_requests_is_counted_once():
    turns = chat_of("chatml").render(CONVERSATION)
    prompt = json.dumps([["user", "a [TOOL_CALLS] b"], ["assistant", turns, []], ["user", "Why?"]])
    texts = [(prompt, "So."), (prompt, "<unused7>"), (prompt, "<unused7>")]
    assert count_spelled_texts(texts) == {"contents_with_control_tokens": 3, "contents_already_templated": 1}


def test_pairs_that_were_templated_before_are_left_out_by_name():
    rendered = chat_of("chatml").render(CONVERSATION[:1])
    assert parse_pairs({"prompt": rendered, "chosen": "a", "rejected": "b"}, "") == "already_templated"
    assert parse_pairs({"prompt": "q", "chosen": "[INST] q [/INST] a", "rejected": "b"}, "") == "already_templated"
    mentions = {"prompt": "What does <|im_start|>user mean, and <|im_end|>?", "chosen": "a", "rejected": "b"}
    assert [type(pair) for pair in parse_pairs(mentions, "")] == [RawPair]
    assert parse_pairs({"prompt": "q", "chosen": "word " * 2_000_000, "rejected": "b"}, "") == "too_long"


PROMPTS = ("Be kind.", 'Say "no"', "a {{ b }} {% c %} {# d #}", "tab\tand\nline \\n", "é 中 😀 '", "</s> <|im_end|>")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_exported_template_writes_the_system_prompt_of_the_training(prompt):
    exported = with_system_prompt(CHATML, prompt)
    assert without_system_prompt(exported) == (CHATML, prompt)
    tokenizer = tokenizer_of("chatml")
    system = {"role": "system", "content": prompt}
    wanted = tokenizer.apply_chat_template([system, *CONVERSATION], chat_template=CHATML, tokenize=False)
    assert tokenizer.apply_chat_template(CONVERSATION, chat_template=exported, tokenize=False) == wanted
    own = [{"role": "system", "content": "Mine."}, *CONVERSATION]
    assert tokenizer.apply_chat_template(own, chat_template=exported, tokenize=False) == (
        tokenizer.apply_chat_template(own, chat_template=CHATML, tokenize=False)
    )


def test_a_tokenizer_that_carries_the_system_prompt_has_it_and_the_same_template_hash():
    trained = chat_of("chatml", system_prompt="Be kind.")
    import copy

    carried = copy.deepcopy(tokenizer_of("chatml"))
    carried.chat_template = trained.exported_template
    for chat in (
        ChatTokenizer(carried, max_length=99),
        ChatTokenizer(carried, max_length=99, system_prompt="Be kind."),
    ):
        assert chat.system_prompt == "Be kind."
        assert chat.template_hash == trained.template_hash == chat_of("chatml").template_hash
        assert chat.encode([CONVERSATION]) == trained.encode([CONVERSATION])
        assert chat.exported_template == trained.exported_template
