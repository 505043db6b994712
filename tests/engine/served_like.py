"""Servers that refuse, ignore and wrap as each kind does: what they take of a request, in the words and with the statuses of their own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.engine.judge_server import JudgeServer

Body = Mapping[str, Any]
Refusal = dict[str, Any] | None
ALTERNATE = "Conversation roles must alternate user/assistant/user/assistant/..."
NO_SYSTEM = "System role not supported"


@dataclass(frozen=True)
class Like:
    """One kind of server: `refuse` answers some requests with an error, `limit` reads the number of tokens, `wrap` makes the message."""

    name: str
    refuse: Callable[[Body, BaseHTTPRequestHandler], Refusal] = lambda body, http: None
    limit: Callable[[Body], int | None] = lambda body: body.get("max_tokens")
    wrap: Callable[[str], dict[str, Any]] = lambda text: {"content": text}
    enforces: str = "json_schema"
    thinks: int = 0
    """Tokens that it spends before an answer, unless it is told to think little."""
    cut: dict[str, Any] = field(default_factory=lambda: {"content": None})
    """What the message is where thinking took all tokens."""

    def serve(self, answer: str) -> JudgeServer:
        """A server of this kind that knows one answer."""
        server = JudgeServer(lambda _: answer, mode=self.enforces)
        server.manners = self.manners
        return server

    def manners(self, body: Body, http: BaseHTTPRequestHandler) -> Refusal:
        if refused := self.refuse(body, http):
            return refused
        thinks = 0 if "low" in str(body.get("reasoning_effort", body.get("reasoning", ""))) else self.thinks
        limit = self.limit(body)
        if limit is not None and limit < thinks + 10:
            usage = {"prompt_tokens": 100, "completion_tokens": limit, "total_tokens": 100 + limit}
            if self.name.startswith("OpenAI"):
                usage["completion_tokens_details"] = {"reasoning_tokens": limit}
            return {"finish": "length", "message": self.cut, "usage": usage}
        return {"wrap": self.wrap}


def _error(status: int, body: Any) -> dict[str, Any]:
    return {"status": status, "body": body}


def _openai_error(message: str, param: str, code: str = "unsupported_parameter", status: int = 400) -> dict[str, Any]:
    return _error(
        status, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}
    )


def _has_system(body: Body) -> bool:
    return body["messages"][0]["role"] == "system"


def _alternates(body: Body) -> bool:
    return [turn["role"] for turn in body["messages"]] == (["user", "assistant"] * 9)[: len(body["messages"])]


def _openai(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    known = {"model", "messages", "stream", "max_completion_tokens", "max_tokens", "temperature", "response_format", "reasoning_effort"}  # fmt: skip
    if unknown := body.keys() - known:
        return _openai_error(
            f"Unrecognized request argument supplied: {min(unknown)}", min(unknown), "unknown_parameter"
        )
    if "max_tokens" in body:
        return _openai_error("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.", "max_tokens")  # fmt: skip
    if body.get("temperature", 1) != 1:
        return _openai_error("Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.", "temperature", "unsupported_value")  # fmt: skip
    if body.get("reasoning_effort") == "none":
        return _openai_error("Unsupported value: 'reasoning_effort' does not support 'none' with this model. Supported values are: 'low', 'medium', and 'high'.", "reasoning_effort", "unsupported_value")  # fmt: skip
    return None


def _small_openai(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if refused := _openai(body, http):
        return refused
    if _has_system(body):
        return _openai_error("Unsupported value: 'messages[0].role' does not support 'system' with this model.", "messages[0].role", "unsupported_value")  # fmt: skip
    for name in ("response_format", "reasoning_effort"):
        if name in body:
            return _openai_error(f"Unsupported parameter: '{name}' is not supported with this model.", name)
    return None


def _azure(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if not http.headers.get("api-key"):
        return _error(401, {"error": {"code": "401", "message": "Access denied due to missing subscription key."}})
    if "api-version=" not in http.path:
        return _error(404, {"error": {"code": "404", "message": "Resource not found"}})
    return _openai(body, http)


def _vllm(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    def refused(message: str) -> dict[str, Any]:
        return _error(400, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})

    if _has_system(body):
        return refused(NO_SYSTEM)
    if (asked := body.get("max_tokens", 0)) > 4096 - 300:
        return refused(f"'max_tokens' or 'max_completion_tokens' is too large: {asked}. This model's maximum context length is 4096 tokens and your request has 300 input tokens ({asked} > 4096 - 300).")  # fmt: skip
    return None


def _llama_cpp(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if not _alternates(body):
        return _error(500, {"error": {"code": 500, "message": f"{ALTERNATE} at row 9, column 27", "type": "server_error"}})  # fmt: skip
    return None


def _lm_studio(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if body.get("response_format", {}).get("type") == "json_object":
        return _error(400, {"error": "'response_format.type' must be 'json_schema' or 'text'"})
    if _has_system(body):
        return _error(400, {"error": f"Error rendering prompt with jinja template: {NO_SYSTEM}."})
    return None


def _openrouter(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if "reasoning_effort" in body and "reasoning" in body:
        return _error(
            400, {"error": {"message": "Only one of reasoning and reasoning_effort may be given", "code": 400}}
        )
    return None


def _together(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if not _alternates(body):
        return _error(422, {"error": {"message": f"Input validation error: {ALTERNATE}", "type": "invalid_request_error", "param": None, "code": None}})  # fmt: skip
    return None


def _mistral(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    known = {"model", "messages", "stream", "max_tokens", "temperature", "response_format"}
    if unknown := sorted(body.keys() - known):
        detail = [{"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": body[name]} for name in unknown]  # fmt: skip
        return _error(422, {"object": "error", "message": {"detail": detail}, "type": "invalid_request_error", "code": None})  # fmt: skip
    return None


def _gemini(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if _has_system(body):
        return _error(400, [{"error": {"code": 400, "message": "Developer instruction is not enabled for models/gemma-3-27b-it", "status": "INVALID_ARGUMENT"}}])  # fmt: skip
    return None


def _tgi(body: Body, http: BaseHTTPRequestHandler) -> Refusal:
    if _has_system(body):
        return _error(422, {"error": f"Template error: invalid operation: {NO_SYSTEM} (in <string>:1)", "error_type": "template_error"})  # fmt: skip
    return None


def _parts(text: str) -> dict[str, Any]:
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": 'maybe {"intruder": 1}'}]}
    return {"content": [thought, {"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]}


def _tagged(text: str) -> dict[str, Any]:
    return {"content": f'<think>\nis it {{"intruder": 1}}?\n</think>\n\n{text}'}


def _beside(name: str) -> Callable[[str], dict[str, Any]]:
    return lambda text: {"content": text, name: 'maybe {"intruder": 1}'}


def _completion_tokens(body: Body) -> int | None:
    return body.get("max_completion_tokens")


LIKES = (
    Like("OpenAI", _openai, limit=_completion_tokens, thinks=900, cut={"content": ""}),
    Like("OpenAI, an early reasoning model", _small_openai, limit=_completion_tokens, thinks=900, cut={"content": ""}, enforces="plain"),
    Like("Azure OpenAI", _azure, limit=_completion_tokens),
    Like("OpenRouter", _openrouter, wrap=_beside("reasoning"), thinks=900, cut={"content": "", "reasoning": "Let me"}),
    Like("Together", _together, wrap=_tagged, enforces="json_object", thinks=900, cut={"content": "<think>\nLet me"}),
    Like("Mistral", _mistral, wrap=_parts, thinks=900, cut={"content": [{"type": "thinking", "thinking": []}]}),
    Like("Gemini", _gemini),
    Like("Ollama", wrap=_beside("reasoning"), thinks=900, cut={"content": "", "reasoning": "Let me"}),
    Like("LM Studio", _lm_studio, wrap=_beside("reasoning_content"), thinks=900, cut={"content": "", "reasoning_content": "Let me"}),
    Like("llama.cpp", _llama_cpp, wrap=_beside("reasoning_content"), thinks=900, cut={"content": None, "reasoning_content": "Let me"}),
    Like("vLLM", _vllm, wrap=_beside("reasoning_content"), thinks=3000, cut={"content": None, "reasoning_content": "Let me"}),
    Like("Text Generation Inference", _tgi, enforces="json_object"),
    Like("transformers serve", wrap=_tagged, enforces="plain", thinks=900, cut={"content": "<think>\nLet me"}),
)  # fmt: skip
