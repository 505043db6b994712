"""Conversations as sources have them: lists of messages, each with a role and a content; and what is wrong with them, by name."""

import json
import re
from collections.abc import Sequence
from typing import Any

from sarm.data.sources.tool_turns import MORE, ToolFault, calls_in, more_of, texts_in, with_more
from sarm.data.tokens.templated_text import is_rendered_conversation
from sarm.settings.checks import UserError

Message = dict[str, str]
ROLES = ("system", "user", "assistant", "tool")
# What the roles of others are here; a turn that is a call alone is one of the assistant's.
_SPELLINGS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    "function_call": "call",
}
# A tokenizer needs a second and some gigabytes for more, nearly all of which a model's context has no room for.
MAX_CONTENT_BYTES = 4 << 20
# How Python spells a list of messages, which tables hold that were written of data frames.
_OF_PYTHON = re.compile(r"\s*(?:array\()?\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
_ROLE_OF_PYTHON = re.compile(rf"['\"](?:role|from)['\"]\s*:\s*['\"](?:{'|'.join(_SPELLINGS)})['\"]", re.I)


class ConversationError(UserError):
    """A conversation that cannot be encoded; `reason` is the word by which every stage counts it."""

    def __init__(self, message: str, reason: str = "template_refuses"):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reason)


def fault_of(text: str) -> str | None:
    """The reason word of a string that no tokenizer should see (`empty`, `nul_byte`, `lone_surrogate`), or None."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "nul_byte"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "lone_surrogate"
    return None


def read_messages(items: Sequence[Any]) -> list[Message] | str:
    """Each message as it is stored; or why they are none: `not_text`, `bad_roles`, `null_content`, `part_not_text`, `bad_tool_call` ...

    Roles and fields may be called as ShareGPT and others call them (`from` and `value`, `human` and `gpt`), and a content may be a list of
    texts, which are joined. A name and calls of tools are kept beside the content (`tool_turns`); the template may have words for them.
    """
    messages: list[Message] = []
    for item in items:
        if not isinstance(item, dict):
            return "not_text"
        said = next((item[key] for key in ("role", "from") if item.get(key) is not None), None)
        if said is None:
            return "not_text"
        role = _SPELLINGS.get(said.lower()) if isinstance(said, str) else None
        if role is None:
            return "bad_roles"
        content = next((item[key] for key in ("content", "value", "text") if item.get(key) is not None), None)
        try:
            # A field of that name in a source is somebody else's.
            more = more_of({name: value for name, value in item.items() if name != MORE})
            if role == "call":
                role, content, more = "assistant", "", {**more, "tool_calls": calls_in(_content(content)[0])}
            text, reason = ("", None) if content is None and "tool_calls" in more else _content(content)
            if reason:
                return reason
            messages.append(with_more({"role": role, "content": text}, more))
        except ToolFault as fault:
            return str(fault)
    return messages


def spelled_messages(value: Any) -> Any:
    """The list of messages that a text spells as JSON, as columns hold it that know only texts; anything else as it is."""
    if not isinstance(value, str) or _OF_PYTHON.match(value) is None:
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_messages = isinstance(found, list) and all(
        isinstance(one, dict) and ({"role", "content"} <= one.keys() or {"from", "value"} <= one.keys())
        for one in found
    )
    return found if is_messages else value


def _content(content: Any) -> tuple[str, str | None]:
    """(the text of a content, why it has none)."""
    if isinstance(content, str):
        return content, None
    if content is None:
        return "", "null_content"
    if not isinstance(content, list):
        return "", "not_text"
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or (isinstance(part, dict) and "text" not in str(part.get("type") or "text")):
            return "", "part_not_text"
        texts.append(text)
    return "".join(texts), None


def fault_of_content(text: str) -> str | None:
    """The reason word of a content that no tokenizer should see, or None: `empty`, `nul_byte`, `lone_surrogate`, `too_long`, `already_templated`, `spelled_messages`."""
    if reason := fault_of(text):
        return reason
    if len(text) > MAX_CONTENT_BYTES // 4 and len(text.encode()) > MAX_CONTENT_BYTES:
        return "too_long"
    if _OF_PYTHON.match(text) and _ROLE_OF_PYTHON.search(text):
        return "spelled_messages"
    return "already_templated" if is_rendered_conversation(text) else None


def fault_of_messages(messages: Sequence[Message]) -> str | None:
    """The reason word of a conversation that no tokenizer should see, or None.

    An empty system turn is a choice, and so is that of an assistant that calls tools, or of a tool that answers nothing; others are an accident.
    """
    for message in messages:
        reason, more = fault_of_content(message["content"]), message.get(MORE)
        if reason and not (reason == "empty" and (message["role"] in ("system", "tool") or more)):
            return reason
        if more and (reason := _fault_of_more(more)):
            return reason
    return None if any(message["role"] != "system" for message in messages) else "empty"


def _fault_of_more(more: str) -> str | None:
    if len(more.encode("utf-8", "surrogatepass")) > MAX_CONTENT_BYTES:
        return "too_long"
    return next((reason for text in texts_in(json.loads(more)) if (reason := fault_of(text)) not in (None, "empty")), None)  # fmt: skip


def answer_text(message: Message) -> str | None:
    """The content of a message that is an answer; None where it calls tools, which is no text to compare."""
    return None if "tool_calls" in more_of(message) else message["content"]


def check_messages(messages: Any) -> None:
    """Raise ConversationError unless these are messages that a template can be given, whatever their roles and order.

    An empty content is one: it is what a model that says nothing says. So is a content that was templated already, which is for the
    readers of data to refuse.
    """
    if isinstance(messages, str):
        raise ConversationError(
            f"expected a list of messages, got the string {messages[:60]!r}. Pass [{{'role': 'user', 'content': ...}}, ...].",
            "not_messages",
        )
    if not isinstance(messages, Sequence) or not all(isinstance(message, dict) for message in messages):
        raise ConversationError(
            f"expected a list of messages, got {type(messages).__name__}. Pass role and content of each.",
            "not_messages",
        )
    if not messages:
        raise ConversationError("a conversation without messages. Pass at least the user's.", "empty")
    for message in messages:
        role, content = message.get("role"), message.get("content")
        try:
            more = more_of(message)
        except ToolFault as fault:
            raise ConversationError(f"the message of {str(role)[:60]} has a name, calls or tools that cannot be read: {fault}. Write them as OpenAI's API does.", str(fault)) from fault  # fmt: skip
        if more and (reason := _fault_of_more(json.dumps(more, ensure_ascii=False))):
            raise ConversationError(f"what the message of {role} has beside its content cannot be encoded: {reason}. Leave it out.", reason)  # fmt: skip
        if content is None and "tool_calls" in more:
            content = ""
        if not isinstance(content, str):
            raise ConversationError(f"the message of {role} has no text as its content. Pass a string.", "not_text")
        if not isinstance(role, str) or not role.isidentifier():
            raise ConversationError(f"{str(role)[:60]!r} is no role. Known are {', '.join(ROLES)}.", "bad_roles")
        reason = fault_of_content(content)
        if reason in ("nul_byte", "lone_surrogate", "too_long"):
            raise ConversationError(f"the message of {role} cannot be encoded: {reason}. Leave it out.", reason)


def transcript(messages: Sequence[Message]) -> str:
    """What is said, without roles: the conversation as a plain text."""
    return "\n\n".join(message["content"].strip() for message in messages if message["content"].strip())
