"""How OpenAI-compatible servers differ: which form of answer they enforce, and which parameters and turns they take.

What an address tells of a server is in `sarm.engine.llm.servers`. All else is seen from what it enforces (`FORMATS`), and from what it
refuses: parameters by name (`PARAMETERS`), and turns of the role `system`.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sarm.contracts.judging import Question, json_schema
from sarm.engine.llm.servers import OTHER, Server

Messages = Sequence[Mapping[str, str]]


def _as_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


PLAIN = "plain"
# From the strictest on: the first that a server enforces is used. Each makes a `response_format` of a name and a JSON schema.
FORMATS: dict[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
    "json_schema": _as_schema,
    "json_object": lambda name, schema: {"type": "json_object"},
}

# What is asked to see whether a format is enforced: only a server that enforces it answers with an object.
PROBE = "Reply with one word, no JSON: what colour is the sky?"
_PROBE_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string"}},
    "required": ["colour"],
    "additionalProperties": False,
}


def probe_format(mode: str) -> Mapping[str, Any]:
    """The `response_format` that `PROBE` is asked with to see whether the server enforces `mode`."""
    return FORMATS[mode]("probe", _PROBE_SCHEMA)


def format_of(question: Question, mode: str) -> Mapping[str, Any] | None:
    """The `response_format` of a question; None for plain text."""
    return None if mode == PLAIN or question.in_lines else FORMATS[mode](question.kind, json_schema(question.form))


# What servers may refuse by name, and the other name that it has; None: it is left out.
PARAMETERS: dict[str, str | None] = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "response_format": None,
    "reasoning_effort": None,
    "reasoning": None,
    "chat_template_kwargs": None,
}
# Of a parameter's name, and not of its value.
_UNKNOWN_NAME = re.compile(
    r"un(?:supported|known|recognized|expected)|not (?:supported|permitted|allowed)|extra", re.IGNORECASE
)
_TOO_MANY = re.compile(
    r"too (?:large|long|many)|context (?:length|window|size)|(?:supports|support) at most|exceed", re.IGNORECASE
)
# Chat templates and services each have their own words for it.
_TURNS = re.compile(
    r"\broles?\b|\bsystem (?:message|prompt|instruction|turn)s?\b|\bdeveloper (?:message|instruction)s?\b",
    re.IGNORECASE,
)


def is_about_room(refusal: str) -> bool:
    """Whether a refusal is of the number of tokens."""
    return bool(_TOO_MANY.search(refusal))


class Dialect:
    """What one server takes, as far as its kind and its refusals tell."""

    def __init__(self, server: Server = OTHER):
        self.server = server
        self.sent_as: dict[str, str | None] = (
            {} if server.tokens_as == "max_tokens" else {"max_tokens": server.tokens_as}
        )
        self.folds_system = False
        self.num_changes = 0
        self._refused: set[str] = set()

    def takes(self, name: str) -> bool:
        """Whether a parameter is sent, under whatever name."""
        return self.sent_as.get(name, name) is not None

    def spoken(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters as the server takes them; those that are None are left out."""
        spoken = {self.sent_as.get(name, name): value for name, value in parameters.items() if value is not None}
        return {name: value for name, value in spoken.items() if name is not None}

    def turns(self, messages: Messages) -> list[dict[str, str]]:
        """The messages as the server takes them: where it takes no system turn, its text begins the first turn of the user."""
        turns = [dict(message) for message in messages]
        if self.folds_system and turns[0]["role"] == "system":
            system, first, *rest = turns
            turns = [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
        return turns

    def adapt(self, refusal: str, sent: Collection[str]) -> str | None:
        """Take a refusal's words into account; `sent` are the names of what was sent. Returns the parameter that is sent in another way, or not at all; None if there is none."""
        for name, other in PARAMETERS.items():
            spoken = self.sent_as.get(name, name)
            if spoken is None or name in self._refused or spoken not in sent:
                continue
            if other is None:
                is_meant = _names(refusal, spoken)
            else:
                other = name if spoken == other else other
                # Who wants another name says which, or that this one is unknown.
                is_meant = not is_about_room(refusal) and (
                    _names(refusal, other) or (_names(refusal, spoken) and bool(_UNKNOWN_NAME.search(refusal)))
                )
            if is_meant:
                self.sent_as[name] = other
                self._refused.add(name)
                self.num_changes += 1
                return name
        return None

    def fold_system(self, refusal: str, messages: Messages) -> bool:
        """Send no system turns any more, if there was one and the refusal is about turns; False if not."""
        if self.folds_system or messages[0]["role"] != "system" or not _TURNS.search(refusal):
            return False
        self.folds_system = True
        self.num_changes += 1
        return True

    def try_again(self, name: str) -> None:
        """Send a parameter again that was refused, with another value."""
        self.sent_as.pop(name, None)
        self._refused.discard(name)


def _names(refusal: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", refusal) is not None
