"""Kinds of OpenAI-compatible servers, one entry each: how an address tells the kind, and what it is sent from the first request on.

An address tells the kind by its host, or by the port that a local server listens at unless told otherwise. What a server does not take, it
refuses by name (`sarm.engine.llm.dialect`); an entry saves these refusals, and says what a server would ignore without a word.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Effort = Callable[[str], Mapping[str, Any]]


def as_field(effort: str) -> Mapping[str, Any]:
    """OpenAI's own parameter."""
    return {"reasoning_effort": effort}


def as_object(effort: str) -> Mapping[str, Any]:
    """OpenRouter's parameter, which it translates for each of the services behind it."""
    return {"reasoning": {"effort": effort}}


def by_template(effort: str) -> Mapping[str, Any]:
    """The parameter, and variables of the chat template by the names of Qwen's, DeepSeek's and gpt-oss's: which of them counts is the model's affair."""
    thinks = effort != "none"
    return {
        **as_field(effort),
        "chat_template_kwargs": {"enable_thinking": thinks, "thinking": thinks, "reasoning_effort": effort},
    }


@dataclass(frozen=True)
class Server:
    """One kind of server."""

    name: str
    at: str
    """Regular expression that addresses of this kind match."""
    tokens_as: str = "max_tokens"
    """The parameter that limits the answer: others of this name are refused by OpenAI, and ignored by Ollama."""
    effort: Effort = as_field
    """How `--judging.reasoning-effort` is sent."""
    key_header: str = ""
    """Header that has the key beside `Authorization`."""


def _host(name: str) -> str:
    return rf"^https?://(?:[^/@]+\.)?{name}(?::\d+)?(?:/|$)"


def _port(number: int) -> str:
    return rf"^https?://[^/@]+:{number}(?:/|$)"


SERVERS = (
    Server("OpenAI", _host(r"api\.openai\.com"), tokens_as="max_completion_tokens"),
    Server(
        "Azure OpenAI",
        _host(r"(?:openai\.azure\.com|cognitiveservices\.azure\.com|services\.ai\.azure\.com)"),
        tokens_as="max_completion_tokens",
        key_header="api-key",
    ),
    Server("OpenRouter", _host(r"openrouter\.ai"), effort=as_object),
    Server("Together", _host(r"together\.(?:ai|xyz)"), effort=by_template),
    Server("Mistral", _host(r"api\.mistral\.ai")),
    Server("Gemini", _host(r"generativelanguage\.googleapis\.com")),
    Server("Ollama", _port(11434)),
    Server("LM Studio", _port(1234)),
    Server("llama.cpp", _port(8080), effort=by_template),
    Server("vLLM", _port(8000), effort=by_template),
)
"""The first whose address matches is taken."""
OTHER = Server("any other", "", effort=by_template)
"""Servers that no address tells, local ones at other ports among them."""


def server_at(base_url: str) -> Server:
    """The kind of server at an address."""
    return next((server for server in SERVERS if re.search(server.at, base_url)), OTHER)
