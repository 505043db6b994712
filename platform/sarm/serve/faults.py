"""What a request is refused with, and how each protocol writes it."""

from collections.abc import Callable
from typing import Any


class RequestError(Exception):
    """A request that is not answered: status, a word for programs, and a sentence without any of the request's text for people.

    `retry_after` in seconds; `item` is the place of what was wrong. `detail`, which may quote the request, goes to the client and not to the log.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        item: int | None = None,
        retry_after: float | None = None,
        detail: str = "",
    ):
        super().__init__(message)
        self.status, self.code, self.message, self.item = status, code, message, item
        # A lone surrogate, which it may quote, is no UTF-8.
        self.retry_after, self.detail = retry_after, detail.encode("utf-8", "replace").decode()

    @property
    def told(self) -> str:
        """What the client is told."""
        return self.detail or self.message


ErrorForm = Callable[[RequestError], dict[str, Any]]

_TEI_TYPES = {413: "Validation", 422: "Validation", 400: "Validation", 429: "Overloaded", 503: "Overloaded", 401: "Unauthorized"}  # fmt: skip


def own_error(error: RequestError) -> dict[str, Any]:
    """As `/v1/rewards` writes it."""
    place = {} if error.item is None else {"item": error.item}
    return {"error": {"code": error.code, "message": error.told, **place}}


def openai_error(error: RequestError) -> dict[str, Any]:
    """As vLLM and SGLang write it, after OpenAI."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.told, "type": kind, "param": None, "code": error.code}}


def tei_error(error: RequestError) -> dict[str, Any]:
    """As text-embeddings-inference writes it."""
    return {"error": error.told, "error_type": _TEI_TYPES.get(error.status, "Backend")}
