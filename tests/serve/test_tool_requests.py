"""Tools in requests: what cannot be read is refused in one line, an answer is read with its calls, and what is spelled in one is flagged."""

import json

import pytest
from tests.data.tokens.test_tools import OPENAI, USER, chat_of

from sarm.data.sources.tool_turns import ToolFault, more_of
from sarm.integrations.source import plain
from sarm.serve.encoding import SPELLED, Encoder

ANSWER = {"role": "assistant", "content": "Here."}


NESTED = "NESTED"


def nested(depth):
    value = 1
    for _ in range(depth):
        value = {"a": [value]}
    return value


def nested_text(depth):
    """What Python's own writer has no stack for."""
    return '{"a": [' * depth + "1" + "]}" * depth


@pytest.mark.parametrize("depth", [40, 600, 3000])
@pytest.mark.parametrize("field", ["tools", "tool_calls"])
def test_what_is_nested_too_deeply_is_a_fault_of_the_request(client, depth, field):
    inner = "parameters" if field == "tools" else "arguments"
    message = {
        "role": "user" if field == "tools" else "assistant",
        "content": "a",
        field: [{"name": "f", inner: NESTED}],
    }
    body = json.dumps({"items": [{"messages": [USER, message, USER, ANSWER]}]})
    found = client.post("/v1/rewards", content=body.replace(f'"{NESTED}"', nested_text(depth)))
    assert found.status_code in (400, 422), found.text
    with pytest.raises(ToolFault):
        more_of({field: [{"name": "f", inner: nested(depth)}]})


@pytest.mark.parametrize("more", [{"tool_calls": OPENAI[1]["tool_calls"]}, {"tools": [{"name": "f"}]}, {"tool_calls": [1]}])  # fmt: skip
def test_an_answer_that_calls_tools_is_not_scored_without_its_calls(client, more):
    """The server's template here has no words for them."""
    found = client.post("/v1/rewards", json={"items": [{"messages": [USER, {**ANSWER, **more}]}]})
    assert found.status_code == 422
    named = client.post("/v1/rewards", json={"items": [{"messages": [USER, {**ANSWER, "name": "Ann"}]}]})
    assert named.status_code == 200


@pytest.mark.parametrize("content", [None, "", "I look."])
def test_an_answer_that_calls_tools_is_read_with_them_where_the_template_writes_them(content):
    chat = chat_of("qwen")
    call = {**OPENAI[1], "content": content}
    found = Encoder(chat, None).messages([USER, call])
    assert found.ids == chat.encode([[USER, call]])[0].ids
    assert found.ids[-1] == chat.end_of_turn_id
    text = chat.tokenizer.decode(found.ids[found.prompt_tokens :])
    assert "bread" in text
    assert "Find" not in text


def test_adapters_send_what_a_message_has_and_ask_for_no_content_beside_a_call():
    call = {name: value for name, value in OPENAI[1].items() if name != "content"}
    asked = {**USER, "tools": [{"name": "f"}]}
    assert plain([asked, call]) == [asked, {**call, "content": None}]


@pytest.mark.parametrize("place", ["arguments", "name", "field"])
def test_what_a_call_spells_is_flagged_as_what_a_content_spells_is(place):
    own = {"arguments": {"q": "x"}, "name": "search"}
    if place == "field":
        own["arguments"] = {"<|im_end|>": "x"}
    else:
        own[place] = {"q": "<|im_end|>"} if place == "arguments" else "<|im_end|>"
    call = {**OPENAI[1], "tool_calls": [{"id": "abcdefgh1", "function": own}]}
    chat = chat_of("qwen")
    encoder = Encoder(chat, None)
    found = encoder.completions([USER, call, OPENAI[2]], ["Here."])[0]
    assert SPELLED in found.flags
    plain = encoder.completions(OPENAI, ["Here."])[0]
    assert SPELLED not in plain.flags
    assert found.ids.count(chat.end_of_turn_id) == plain.ids.count(chat.end_of_turn_id)
    assert SPELLED in encoder.messages([USER, call]).flags
