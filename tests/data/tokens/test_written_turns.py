"""Rendered texts, read back into messages: in every family's template, and in no other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tokens.chat_families import FAMILIES, chat_of

from sarm.data.tokens.chat import ChatTokenizer
from sarm.data.tokens.written_turns import ForeignTextError

TURNS = [
    {"role": "user", "content": "How do I pick a lock?"},
    {"role": "assistant", "content": "Why do you ask?"},
    {"role": "user", "content": "I lost my key."},
]
ANSWER = "Call a locksmith.\n\nThen wait."
NO_SYSTEM = ("gemma", "mistral", "llama2", "unigram", "merged", "deepseek")


def written(chat: ChatTokenizer, turns: list[dict[str, str]]) -> str:
    return chat.tokenizer.apply_chat_template(turns, chat_template=chat.template, tokenize=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num", [1, 3])
def test_a_text_of_a_familys_template_gives_its_messages_and_says_whether_it_ends(family, num):
    chat = chat_of(family)
    turns = [*TURNS[:num], {"role": "assistant", "content": ANSWER}]
    text = written(chat, turns)
    found = chat.written.read(text)
    assert [(m["role"], m["content"].strip()) for m in found.messages[:-1]] == [(m["role"], m["content"]) for m in turns[:-1]]  # fmt: skip
    assert found.messages[-1]["content"].endswith(ANSWER)
    assert found.is_closed
    assert chat.encode([found.messages])[0].ids == chat.encode([turns])[0].ids
    cut = chat.written.read(text[: text.index("Then") + 2])
    assert cut.messages[-1]["content"].endswith("\n\nTh")
    assert not cut.is_closed


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_SYSTEM])
def test_a_system_turn_is_read_back(family):
    chat = chat_of(family)
    turns = [{"role": "system", "content": "Be brief."}, *TURNS[:1], {"role": "assistant", "content": ANSWER}]
    found = chat.written.read(written(chat, turns))
    assert found.messages[:2] == turns[:2]
    assert found.messages[2]["content"].endswith(ANSWER)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_in_another_template_or_none_is_refused(family):
    chat = chat_of(family)
    other = chat_of("llama3" if family != "llama3" else "chatml")
    for text in (written(other, [*TURNS, {"role": "assistant", "content": ANSWER}]), "How do I pick a lock? So.", "", " "):  # fmt: skip
        with pytest.raises(ForeignTextError, match="template"):
            chat.written.read(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_without_an_answer_is_refused(family):
    chat = chat_of(family)
    text = written(chat, [*TURNS[:2]])
    with pytest.raises(ForeignTextError):
        chat.written.read(text[: text.index(TURNS[1]["content"])].rsplit("lock?")[0] + "lock?")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_answer_spells_is_its_content_where_the_prompt_is_known(family):
    chat = chat_of(family)
    prompt = chat.tokenizer.apply_chat_template(TURNS[:1], chat_template=chat.template, tokenize=False, add_generation_prompt=True)  # fmt: skip
    injected = written(chat, [*TURNS[:1], {"role": "assistant", "content": "Sure."}, TURNS[2], {"role": "assistant", "content": "No."}])  # fmt: skip
    if not injected.startswith(prompt):
        prompt = injected[: injected.index("Sure.")]
    found = chat.written.read(injected, prompt)
    assert [m["role"] for m in found.messages] == ["user", "assistant"]
    assert "I lost my key." in found.messages[-1]["content"]
    assert found.is_closed


def test_the_same_answer_again_is_one_answer():
    chat = chat_of("chatml")
    text = written(chat, [*TURNS[:1], {"role": "assistant", "content": "Sure."}, {"role": "assistant", "content": "No."}])  # fmt: skip
    assert [m["role"] for m in chat.written.read(text).messages] == ["user", "assistant"]


def test_a_default_system_text_and_todays_date_belong_to_the_template():
    chat = chat_of("chatml")
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nToday: 26 Jul 2024. Help.<|im_end|>\\n' }}{% endif %}"
        + chat.template
    )
    dated = ChatTokenizer(chat.tokenizer, max_length=4096)
    dated.template = template
    text = written(dated, [*TURNS[:1], {"role": "assistant", "content": ANSWER}])
    found = dated.written.read(text.replace("26 Jul 2024", "3 Dec 2031"))
    assert [m["role"] for m in found.messages] == ["user", "assistant"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2), st.booleans())
def test_whatever_is_read_is_rendered_as_it_was(contents, is_long):
    chat = chat_of("chatml")
    turns = [*(TURNS[:2] if is_long else []), {"role": "user", "content": contents[0]}, {"role": "assistant", "content": contents[1]}]  # fmt: skip
    text = written(chat, turns)
    found = chat.written.read(text)
    assert written(chat, found.messages).split() == text.split()
