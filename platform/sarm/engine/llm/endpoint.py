"""One OpenAI-compatible server: a request, and what each way of failing means.

The library's own retries are off: it does not wait out a `Retry-After` beyond two minutes, and it retries behind the back of
budget and pace. A key leaves this module only in the Authorization header; texts of errors are cleaned of it.
"""

import email.utils
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from sarm.engine.llm.dialect import Dialect
from sarm.settings.checks import UserError
from sarm.settings.judging import JudgeSpec

Messages = Sequence[Mapping[str, str]]
_RETRIED = (408, 409, 425, 429)
_MAX_BODY_BYTES = 256 * 1024


class JudgeStoppedError(UserError):
    """The run cannot go on asking now; asked again later it goes on where it was."""


@dataclass
class TransientError(Exception):
    """A request that may succeed when sent again; `wait` is what the server asked for, in seconds."""

    reason: str
    throttled: bool = False
    unreachable: bool = False
    wait: float | None = None


@dataclass
class DeclinedError(Exception):
    """A request that the server will not answer however often it is sent."""

    reason: str
    by_filter: bool = False


class _Capped(httpx2.AsyncByteStream):
    """A body that breaks off where it is longer than any answer to our questions, so that one without an end is not read to it."""

    def __init__(self, body: Any):
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = _MAX_BODY_BYTES
        async for chunk in self._body:
            left -= len(chunk)
            if left < 0:
                raise TransientError(f"the body of the answer has more than {_MAX_BODY_BYTES:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._body.aclose()


async def _cap(response: Any) -> None:
    response.stream = _Capped(response.stream)


@dataclass(frozen=True)
class Completion:
    """What came back; token counts are None where the server does not count."""

    text: str
    finish: str
    refusal: str
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass
class Endpoint:
    """A judge's server, and which parameters it takes."""

    spec: JudgeSpec
    key: str = field(repr=False)
    timeout: float
    dialect: Dialect = field(default_factory=Dialect)

    def __post_init__(self) -> None:
        self._client = openai.AsyncOpenAI(
            api_key=self.key,
            base_url=self.spec.base_url,
            timeout=self.timeout,
            max_retries=0,
            # Questions go where the user sent them: another host would be told what is asked.
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [_cap]}),
            # The cap counts what arrives: packed, it could be a thousand times as much.
            default_headers={"Accept-Encoding": "identity"},
        )

    async def send(self, messages: Messages, max_tokens: int, response_format: Mapping[str, Any] | None) -> Completion:
        """One answer; parameters that the server refuses by name are renamed or left out, once each.

        Raises TransientError, DeclinedError, or JudgeStoppedError where no request at all can succeed (key, model, quota).
        """
        while True:
            extra = self.dialect.spoken(
                {"temperature": 0, "response_format": response_format, "max_tokens": max_tokens}
            )
            try:
                body: dict[str, Any] = {"model": self.spec.model, "messages": list(messages), "stream": False, **extra}
                answer = await self._client.chat.completions.create(**body)
            except openai.APITimeoutError:
                raise TransientError(f"no answer within {self.timeout:g} s") from None
            except openai.APIConnectionError as error:
                if isinstance(error.__cause__, TransientError):
                    raise error.__cause__ from None
                raise TransientError(
                    self._clean(f"no connection ({error.__cause__ or error})"), unreachable=True
                ) from None
            except openai.APIStatusError as error:
                if error.status_code in (400, 422) and self.dialect.adapt(error.message):
                    continue
                raise self._fault(error) from None
            except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError):
                raise TransientError("the body of the answer is no JSON") from None
            return _read(answer)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _fault(self, error: openai.APIStatusError) -> Exception:
        status, name = error.status_code, f"{self.spec.model} at {self.spec.base_url}"
        said = self._clean(" ".join(error.message.split()))[:200]
        code = f"{error.code or ''} {error.type or ''}"
        if 300 <= status < 400:
            return JudgeStoppedError(f"{name} sends its callers elsewhere (HTTP {status}), which is not followed. Pass the address that answers to --judging.judges.")  # fmt: skip
        if status in (401, 403):
            return JudgeStoppedError(f"{name} refused the key (HTTP {status}: {said}). Set the right one, see --judging.keys, and run the same command.")  # fmt: skip
        if status == 404:
            return JudgeStoppedError(f"{name} was not found (HTTP 404: {said}). Pass another --judging.judges.")
        if status == 402 or "insufficient_quota" in code or "billing" in code:
            return JudgeStoppedError(
                f"{name} says that nothing is left to spend ({said}). Top up and run the same command."
            )
        if status in _RETRIED or status >= 500:
            wait = _retry_after(error.response.headers)
            return TransientError(f"HTTP {status}: {said}", throttled=status == 429, wait=wait)
        return DeclinedError(f"HTTP {status}: {said}", by_filter="content_filter" in f"{code} {said}")

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "[key]") if len(self.key) > 6 else text


def _read(answer: Any) -> Completion:
    """The first choice; tolerant of servers that leave fields out."""
    try:
        choice = answer.choices[0]
        message = choice.message
        usage = getattr(answer, "usage", None)
        return Completion(
            text=message.content or "",
            finish=choice.finish_reason or "",
            refusal=getattr(message, "refusal", None) or "",
            prompt_tokens=getattr(usage, "prompt_tokens", None),
            completion_tokens=getattr(usage, "completion_tokens", None),
        )
    except (AttributeError, IndexError, TypeError):
        raise TransientError("the body of the answer is no chat completion") from None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, `retry-after` in seconds or as a date."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        if (text := headers.get(name)) is None:
            continue
        try:
            seconds = float(text) / scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
