"""What messages have beside a role and a content: a name, calls of tools and what they answered, and the tools that are offered.

In a stored message it is one text, `more`: JSON with `name`, `tool_calls`, `tool_call_id`, and at one message of a conversation `tools`,
all in the form that chat templates take (OpenAI's, with a call's arguments as an object).
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

MORE = "more"
_FIELDS = ("name", "tool_calls", "tool_call_id", "tools")
# Of lists and objects within each other: deeper ones take a template, and what reads them, to the end of its stack.
_MAX_DEPTH = 64


class ToolFault(ValueError):  # noqa: N818 - a reason word on its way to a Reject
    """Why what a message has beside its content cannot be kept."""


def more_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message has beside role and content, stored or as an endpoint is sent it; empty for most.

    Raises ToolFault `bad_tool_call`, `bad_tools` or `bad_name`.
    """
    kept = message.get(MORE)
    if kept is not None:
        found = _decoded(kept, "bad_tool_call")
        if not isinstance(found, dict):
            raise ToolFault("bad_tool_call")
        return _normal(found)
    return _normal(message) if any(message.get(name) for name in (*_FIELDS, "function_call")) else {}


def with_more(message: dict[str, str], more: Mapping[str, Any]) -> dict[str, str]:
    """The message with what it has beside its content as one text. Raises ToolFault for what JSON cannot hold."""
    if not more:
        return message
    try:
        return {**message, MORE: json.dumps(more, ensure_ascii=False, allow_nan=False)}
    except (TypeError, ValueError, RecursionError) as error:
        raise ToolFault("bad_tools" if "tools" in more else "bad_tool_call") from error


def offered(messages: list[dict[str, str]], tools: Any) -> list[dict[str, str]]:
    """The messages, the first of which says what tools the conversation offers; `tools` is a list or its JSON. Raises ToolFault."""
    found = _tools(tools)
    if not found or not messages:
        return messages
    return [with_more({**messages[0]}, {**more_of(messages[0]), "tools": found}), *messages[1:]]


def calls_in(text: str) -> list[dict[str, Any]]:
    """The calls that a turn of calls alone spells as JSON (ShareGPT's `function_call`). Raises ToolFault."""
    return _calls(_decoded(text, "bad_tool_call"))


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, the names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from texts_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_in(one)


def _normal(given: Mapping[str, Any]) -> dict[str, Any]:
    name, call_id = given.get("name"), given.get("tool_call_id")
    if not all(isinstance(one, str) for one in (name, call_id) if one is not None):
        raise ToolFault("bad_name")
    calls = given.get("tool_calls") or given.get("function_call")
    found = {
        "name": name if name and name.strip() and name != given.get("role") else None,
        "tool_calls": _calls(_decoded(calls, "bad_tool_call")) if calls else None,
        "tool_call_id": call_id or None,
        "tools": _tools(given.get("tools")) or None,
    }
    return {field: value for field, value in found.items() if value}


def _calls(given: Any) -> list[dict[str, Any]]:
    calls = []
    for one in given if isinstance(given, list) else [given]:
        one = _without_nulls(one, "bad_tool_call")
        said = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(said, dict) or not isinstance(said.get("name"), str) or not said["name"].strip():
            raise ToolFault("bad_tool_call")
        arguments = said.get("arguments", said.get("parameters", {}))
        if isinstance(arguments, str):
            # What is no JSON, or too deep, stays the text that it is.
            with contextlib.suppress(ValueError, RecursionError):
                arguments = _shallow(json.loads(arguments), "bad_tool_call")
        call_id = {"id": one["id"]} if isinstance(one.get("id"), str) else {}
        calls.append({**call_id, "type": "function", "function": {"name": said["name"], "arguments": arguments}})
    if not calls:
        raise ToolFault("bad_tool_call")
    return calls


def _tools(given: Any) -> list[dict[str, Any]]:
    tools = _without_nulls(_decoded(given, "bad_tools"), "bad_tools") or []
    found = []
    for one in tools if isinstance(tools, list) else [tools]:
        said = one.get("function", one) if isinstance(one, dict) else None
        if not isinstance(said, dict) or not isinstance(said.get("name"), str) or not said["name"].strip():
            raise ToolFault("bad_tools")
        found.append(one if "function" in one else {"type": "function", "function": one})
    return found


def _decoded(value: Any, reason: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise ToolFault(reason) from error


def _without_nulls(value: Any, reason: str) -> Any:
    """Without fields that are null: tables with columns give every tool the parameters of all. Raises ToolFault `reason` for what is too deep."""
    return _cleaned(_shallow(value, reason))


def _cleaned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _cleaned(one) for name, one in value.items() if one is not None}
    return [_cleaned(one) for one in value] if isinstance(value, (list, tuple)) else value


def _shallow(value: Any, reason: str) -> Any:
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner = [one.values() if isinstance(one, Mapping) else one for one in level if isinstance(one, (Mapping, list, tuple))]  # fmt: skip
        level = [one for own in inner for one in own]
        if not level:
            return value
    raise ToolFault(reason)
