"""Tools in requests: what cannot be read is refused in one line, a call that is to be rewarded too, and what is spelled in one is flagged."""

import json

import pytest
from tests.data.tokens.test_tools import OPENAI, USER, chat_of

from sarm.data.sources.conversations import ConversationError
from sarm.data.sources.tool_turns import ToolFault, more_of
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


@pytest.mark.parametrize(
    "more", [{"tool_calls": OPENAI[1]["tool_calls"]}, {"tools": [{"name": "f"}]}, {"tool_calls": [1]}]
)
def test_an_answer_that_calls_tools_is_not_scored_without_its_calls(client, more):
    found = client.post("/v1/rewards", json={"items": [{"messages": [USER, {**ANSWER, **more}]}]})
    assert found.status_code == 422
    assert (
        client.post("/v1/rewards", json={"items": [{"messages": [USER, {**ANSWER, "name": "Ann"}]}]}).status_code == 200
    )


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
    with pytest.raises(ConversationError):
        encoder.messages([USER, call])
