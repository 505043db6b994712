"""What a chat template writes beside contents, found by giving it some: names, tools that are offered, calls of them, what they answered."""

from collections.abc import Callable, Sequence
from typing import Any

from sarm.data.sources.conversations import ConversationError, Message
from sarm.data.sources.tool_turns import more_of

NAMES = "names"
TOOLS = "tools that are offered"
# Without tools that are offered, and with them: some templates write calls there alone.
CALLS = ("calls of tools that nobody offered", "calls of tools")
RESULTS = ("answers of tools that nobody offered", "answers of tools")
KINDS = (NAMES, TOOLS, *CALLS, *RESULTS)

_NAME, _TOOL, _ARGUMENT, _RESULT, _ASKED = "Nz7ame", "Tz7ool", "Az7rg", "Rz7esult", "Qz7uestion"
_OFFERED = {"type": "function", "function": {"name": _TOOL, "description": "Looks it up.", "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Where."}}, "required": ["place"]}}}  # fmt: skip
# Some templates take ids of nine letters and digits alone.
_ID = "call00001"
_CALL = {"id": _ID, "type": "function", "function": {"name": _TOOL, "arguments": {"place": _ARGUMENT}}}

Turns = Sequence[dict[str, Any]]


def kinds_said(apply: Callable[[Turns], str]) -> frozenset[str]:
    """Those of `KINDS` that the template writes; `apply` renders turns and raises ConversationError."""
    user: dict[str, Any] = {"role": "user", "content": _ASKED}
    offering, answer = {**user, "tools": [_OFFERED]}, {"role": "assistant", "content": "Done."}
    call = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": _ID}
    probes: list[tuple[str, Turns, tuple[str, ...]]] = [
        (NAMES, [{**user, "name": _NAME}, answer], (_NAME,)),
        (TOOLS, [offering, answer], (_TOOL, _ASKED)),
    ]
    for number, first in enumerate((user, offering)):
        # The name stands in what is offered too.
        probes.append((CALLS[number], [first, call, result, answer], (_ARGUMENT,)))
        probes.append((RESULTS[number], [first, call, result, answer], (_RESULT,)))
    return frozenset(kind for kind, turns, words in probes if _writes(apply, turns, words))


def _writes(apply: Callable[[Turns], str], turns: Turns, words: Sequence[str]) -> bool:
    try:
        text = apply(turns)
    except ConversationError:
        return False
    return all(word in text for word in words)


def apply_template(tokenizer: Any, turns: Turns, **options: Any) -> str:
    """What the tokenizer's template makes of turns, one of which may say what the conversation offers. Raises what the template raises."""
    tools = next((turn["tools"] for turn in turns if "tools" in turn), None)
    plain = [{name: value for name, value in turn.items() if name != "tools"} for turn in turns]
    return str(tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, **options))


def turns_of(messages: Sequence[Message], says: Callable[[], frozenset[str]]) -> list[dict[str, Any]]:
    """Messages as a template takes them that writes what it `says`, of `KINDS`.

    Raises ConversationError `template_without_tools` where it has no words for their tools. Names that it does not write are left out:
    a tool's is that of its call, and whoever inspects a source is told of the others.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message["role"], "content": message["content"] or "", **more_of(message)}
        if "name" in turn and (turn["role"] == "tool" or NAMES not in says()):
            del turn["name"]
        turns.append(turn)
    is_offered = any("tools" in turn for turn in turns)
    needed = {TOOLS} if is_offered else set()
    needed |= {CALLS[is_offered] for turn in turns if "tool_calls" in turn}
    needed |= {RESULTS[is_offered] for turn in turns if turn["role"] == "tool"}
    if needed and (lacking := sorted(needed - says())):
        raise ConversationError(f"the chat template does not write {' and '.join(lacking)}. Pass one that does to --model.chat-template.", "template_without_tools")  # fmt: skip
    return turns
