"""Conversations as sources have them: lists of messages, each with a role and a content."""

from collections.abc import Sequence
from typing import Any

from sarm.data.rows import fault_of

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


def read_messages(items: Sequence[Any]) -> list[Message] | str:
    """Role and content of each message, whatever else it carries left out; or why it is none: `not_text`, `bad_roles`."""
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            return "not_text"
        if item.get("role") not in ROLES:
            return "bad_roles"
    return [{"role": item["role"], "content": item["content"]} for item in items]


def fault_of_messages(messages: Sequence[Message]) -> str | None:
    """The reason word of a conversation that no tokenizer should see, or None. An empty system turn is a choice, others an accident."""
    for message in messages:
        reason = fault_of(message["content"])
        if reason and not (reason == "empty" and message["role"] == "system"):
            return reason
    return None if any(message["role"] != "system" for message in messages) else "empty"


def transcript(messages: Sequence[Message]) -> str:
    """What is said, without roles: the conversation as a plain text."""
    return "\n\n".join(message["content"].strip() for message in messages if message["content"].strip())
