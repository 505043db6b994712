"""How OpenAI-compatible servers differ: which form of answer they enforce, and which parameters they take. One entry each.

A server is not asked by name what it speaks: it is seen from what it enforces (`FORMATS`), and from what it refuses (`PARAMETERS`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sarm.contracts.judging import Question, json_schema


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


# What servers may refuse by name, and the name under which it is sent then; None: it is left out.
PARAMETERS: dict[str, str | None] = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "response_format": None,
}


@dataclass
class Dialect:
    """The parameters that one server takes, as far as its refusals have told."""

    sent_as: dict[str, str | None] = field(default_factory=dict)
    """Refused parameters by the name under which they are sent now; None: left out."""

    def takes(self, name: str) -> bool:
        """Whether a parameter is sent, under whatever name."""
        return self.sent_as.get(name, name) is not None

    def spoken(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters as the server takes them; those that are None are left out."""
        spoken = {self.sent_as.get(name, name): value for name, value in parameters.items() if value is not None}
        return {name: value for name, value in spoken.items() if name is not None}

    def adapt(self, refusal: str) -> bool:
        """Take a refusal's words into account; False if they name no parameter that could still be sent in another way."""
        for name, other in PARAMETERS.items():
            # Who wants another name says which.
            if name not in self.sent_as and (other or name) in refusal:
                self.sent_as[name] = other
                return True
        return False

    def try_again(self, name: str) -> None:
        """Send a parameter again that was refused, with another value."""
        self.sent_as.pop(name, None)
