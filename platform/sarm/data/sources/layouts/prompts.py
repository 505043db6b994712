"""The messages before the answers, in all spellings that sources have for them."""

import json
import re
from typing import Any

from sarm.data.sources.conversations import Message, answer_text, read_messages
from sarm.data.sources.layouts.layout import Answers, Fault, Fields, present
from sarm.data.sources.tool_turns import MORE, ToolFault, offered

_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[^\S\n]?")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SYSTEM = ("system", "system_prompt", "system_message")
AROUND = (*SYSTEM, "tools")
"""Columns of every layout: a system turn, and the tools that the conversation offers."""


def is_transcript(text: Any) -> bool:
    """Whether a text begins as HH's transcripts do."""
    return isinstance(text, str) and _HH_TURN.match(text) is not None


def messages_in(items: Any) -> list[Message]:
    """A list of messages. Raises Fault as `read_messages` says."""
    if not isinstance(items, list):
        raise Fault("not_text")
    messages = read_messages(items)
    if isinstance(messages, str):
        raise Fault(messages)
    return messages


def turns_in(text: str) -> list[Message]:
    """The turns of one of HH's transcripts."""
    # re.split with one group: "", role, content, role, content, ...
    parts = _HH_TURN.split(text)
    return [
        {"role": _HH_ROLES[role], "content": content.strip()}
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def prompt_in(fields: Fields, *names: str) -> list[Message]:
    """The messages before the answers, from the first of these columns that has any, behind the row's system turn.

    A prompt is a text (the user's turn, or one of HH's transcripts), one message or a list of them. Raises Fault.
    """
    prompt = present(fields, *names)
    if isinstance(prompt, dict):
        prompt = prompt.get("messages", [prompt])
    if isinstance(prompt, list):
        return with_system(messages_in(prompt), fields)
    if not isinstance(prompt, str):
        raise Fault("not_text")
    if is_transcript(prompt):
        turns = turns_in(prompt)
        # The open turn of the answer to come.
        open_turn = turns[-1] == {"role": "assistant", "content": ""}
        return with_system(turns[:-1] if open_turn else turns, fields)
    return with_system([{"role": "user", "content": prompt}], fields)


def instruction_in(fields: Fields, *names: str) -> list[Message]:
    """Alpaca's prompt: an instruction, below it its input if there is one, behind the exchanges of `history`."""
    instruction = present(fields, *names)
    more = fields.get("input")
    if more is not None and not isinstance(more, str):
        raise Fault("not_text")
    if not more or not more.strip():
        asked = prompt_in(fields, *names)
    elif isinstance(instruction, str):
        asked = with_system([{"role": "user", "content": f"{instruction}\n{more}"}], fields)
    else:
        raise Fault("not_text")
    history: list[Message] = []
    for exchange in fields.get("history") or ():
        if (
            not isinstance(exchange, (list, tuple))
            or len(exchange) != 2
            or not all(isinstance(t, str) for t in exchange)
        ):
            raise Fault("not_text")
        history += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    num_system = asked[0]["role"] == "system" if asked else 0
    return [*asked[:num_system], *history, *asked[num_system:]]


def with_system(messages: list[Message], fields: Fields) -> list[Message]:
    """The messages behind the system turn that a column of the row holds, if one does, with the tools that another column offers.

    Raises Fault `bad_tools` for tools that cannot be read, `two_system_turns` if the messages begin with another system turn.
    """
    try:
        return offered(_behind_system(messages, fields), fields.get("tools"))
    except ToolFault as fault:
        raise Fault(str(fault)) from fault


def _behind_system(messages: list[Message], fields: Fields) -> list[Message]:
    system = next((fields[name] for name in SYSTEM if fields.get(name)), None)
    if system is None:
        return messages
    if not isinstance(system, str):
        raise Fault("not_text")
    if not system.strip():
        return messages
    turn = {"role": "system", "content": system}
    if not messages or messages[0]["role"] != "system":
        return [turn, *messages]
    if messages[0] != turn:
        raise Fault("two_system_turns")
    return messages


def answer_in(value: Any) -> Any:
    """An answer that may be one message of the assistant, or a list of it alone; what is neither is returned as it is. Raises Fault."""
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        return value
    if not messages:
        raise Fault("empty_answer")
    if not all(isinstance(message, dict) for message in messages):
        raise Fault("not_text")
    read = messages_in(messages)
    if len(read) != 1 or read[0]["role"] != "assistant":
        raise Fault("bad_roles")
    return said_in(read[0])


def said_in(answer: Message) -> str:
    """The text of an answer. Raises Fault `tool_call` for one that calls tools."""
    text = answer_text(answer)
    if text is None:
        raise Fault("tool_call")
    return text


def split(chosen: list[Message], rejected: list[Message], prompt: list[Message]) -> Answers:
    """The shared prompt and the last answers of two conversations, which go on after `prompt` unless they begin with it. Raises Fault."""
    if not chosen or not rejected:
        raise Fault("empty_answer")
    if chosen[:-1] != rejected[:-1]:
        raise Fault("prompt_differs")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Fault("bad_roles")
    return Answers(_joined(prompt, chosen[:-1]), said_in(chosen[-1]), said_in(rejected[-1]))


def _joined(prompt: list[Message], shared: list[Message]) -> list[Message]:
    (system, asked), (own_system, own) = _without_system(prompt), _without_system(shared)

    def said(turns: list[Message]) -> list[tuple[str, str, str | None]]:
        return [(turn["role"], turn["content"].strip(), turn.get(MORE)) for turn in turns]

    if said(own[: len(asked)]) != said(asked):
        if own_system:
            raise Fault("prompt_differs")
        return [*prompt, *shared]
    if system and own_system and system != own_system:
        raise Fault("two_system_turns")
    return [*(own_system or system), *own]


def _without_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    num = 1 if messages and messages[0]["role"] == "system" else 0
    return messages[:num], messages[num:]


def json_list(value: Any) -> Any:
    """A list that a column holds as JSON text; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
