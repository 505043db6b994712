"""One OpenAI-compatible server: a request, and what each way of failing means.

The library's own retries are off: it does not wait out a `Retry-After` beyond two minutes, and it retries behind the back of
budget and pace. A key leaves this module only in the Authorization header; texts of errors are cleaned of it.
"""

import email.utils
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai

from sarm.contracts.judging import without_thinking
from sarm.engine.llm.dialect import Dialect, Messages, is_about_room
from sarm.engine.llm.servers import server_at
from sarm.engine.terminal import say
from sarm.settings.checks import UserError
from sarm.settings.judging import JudgeSpec

_RETRIED = (408, 409, 425, 429)
# A chat template that takes no system turn refuses it, by some servers with 500.
_TAUGHT_BY, _TAUGHT_TURNS_BY = (400, 422), (400, 422, 500)
_MIN_BODY_BYTES, _BYTES_PER_TOKEN = 256 * 1024, 24
# Both as the protocol names it and as services do that translate their own.
_CUT = ("length", "max_tokens", "MAX_TOKENS", "model_length")


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
    by_room: bool = False
    """Whether the answer was to have more tokens than the model has room for."""


class _Capped(httpx2.AsyncByteStream):
    """A body that breaks off where it is longer than any answer to our questions, so that one without an end is not read to it."""

    def __init__(self, body: Any, most: int):
        self._body, self._most = body, most

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._most
        async for chunk in self._body:
            left -= len(chunk)
            if left < 0:
                raise TransientError(f"the body of the answer has more than {self._most:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._body.aclose()


def _cap(most: Callable[[], int]) -> Callable[[Any], Any]:
    async def cap(response: Any) -> None:
        response.stream = _Capped(response.stream, most())

    return cap


@dataclass(frozen=True)
class Completion:
    """What came back; token counts are None where the server does not count."""

    text: str
    finish: str
    refusal: str
    prompt_tokens: int | None
    completion_tokens: int | None
    thought: bool = False
    """Whether the model thought before it answered, in the text or beside it."""

    @property
    def answer(self) -> str:
        """The text without what the model thought."""
        return without_thinking(self.text)

    @property
    def is_cut(self) -> bool:
        """Whether the number of tokens ended it."""
        return self.finish in _CUT


@dataclass
class Endpoint:
    """A judge's server, and which parameters it takes."""

    spec: JudgeSpec
    key: str = field(repr=False)
    timeout: float
    effort: str | None = None

    def __post_init__(self) -> None:
        server = server_at(self.spec.base_url)
        self.dialect = Dialect(server)
        self._thinking = {} if self.effort is None else dict(server.effort(self.effort))
        self._most_bytes = _MIN_BODY_BYTES
        self._client = openai.AsyncOpenAI(
            api_key=self.key,
            base_url=self.spec.base_url,
            timeout=self.timeout,
            max_retries=0,
            # Questions go where the user sent them: another host would be told what is asked.
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [_cap(lambda: self._most_bytes)]}
            ),
            # The cap counts what arrives: packed, it could be a thousand times as much.
            default_headers={
                "Accept-Encoding": "identity",
                **({server.key_header: self.key} if server.key_header else {}),
            },
            default_query={"api-version": self.spec.api_version} if self.spec.api_version else None,
        )

    async def send(self, messages: Messages, max_tokens: int, response_format: Mapping[str, Any] | None) -> Completion:
        """One answer. Parameters that the server refuses by name are renamed or left out, once each, and so is the system turn.

        Raises TransientError, DeclinedError, or JudgeStoppedError where no request at all can succeed (key, model, quota).
        """
        self._most_bytes = max(self._most_bytes, _BYTES_PER_TOKEN * max_tokens)
        while True:
            num_changes = self.dialect.num_changes
            extra = self.dialect.spoken(
                {"temperature": 0, "response_format": response_format, "max_tokens": max_tokens, **self._thinking}
            )
            try:
                answer = await self._client.chat.completions.create(
                    model=self.spec.model,
                    messages=self.dialect.turns(messages),  # type: ignore[arg-type]
                    stream=False,
                    extra_body=extra,
                )
            except openai.APITimeoutError:
                raise TransientError(f"no answer within {self.timeout:g} s") from None
            except openai.APIConnectionError as error:
                if isinstance(error.__cause__, TransientError):
                    raise error.__cause__ from None
                raise TransientError(
                    self._clean(f"no connection ({error.__cause__ or error})"), unreachable=True
                ) from None
            except openai.APIStatusError as error:
                # Another request may have taught it meanwhile.
                if self._learns(error, messages, extra) or num_changes != self.dialect.num_changes:
                    continue
                raise self._fault(error) from None
            except (openai.APIError, json.JSONDecodeError, UnicodeDecodeError):
                raise TransientError("the body of the answer is no JSON") from None
            return _read(answer)

    def _learns(self, error: openai.APIStatusError, messages: Messages, sent: Mapping[str, Any]) -> bool:
        """Whether a refusal says what is to be sent in another way."""
        if error.status_code in _TAUGHT_BY and (name := self.dialect.adapt(_words(error), sent)):
            if name in self._thinking:
                say(f"{self.spec.model}: takes no {name} {self.effort!r}, which is left out")
            return True
        return error.status_code in _TAUGHT_TURNS_BY and self.dialect.fold_system(_words(error), messages)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _fault(self, error: openai.APIStatusError) -> Exception:
        status, name = error.status_code, f"{self.spec.model} at {self.spec.base_url}"
        said = self._clean(" ".join(_words(error).split()))[:200]
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
        by_filter = "content_filter" in f"{code} {said}"
        return DeclinedError(f"HTTP {status}: {said}", by_filter, by_room=is_about_room(_words(error)))

    def _clean(self, text: str) -> str:
        return text.replace(self.key, "[key]") if len(self.key) > 6 else text


def _words(error: openai.APIStatusError) -> str:
    """What the server says; the library reads it out of bodies of OpenAI's shape alone."""
    is_bare = error.message.strip() == f"Error code: {error.status_code}"
    return f"{error.message} - {error.response.text[:2000]}" if is_bare else error.message


def _read(answer: Any) -> Completion:
    """The first choice; tolerant of servers that leave fields out, and of contents that are lists of parts."""
    try:
        choice = answer.choices[0]
        message = choice.message
        usage = getattr(answer, "usage", None)
        text, part_refusal, part_thought = _of_parts(message.content)
        details = getattr(usage, "completion_tokens_details", None)
        beside = [getattr(message, name, None) for name in ("reasoning_content", "reasoning", "thinking")]
        return Completion(
            text=text,
            finish=choice.finish_reason or "",
            refusal=getattr(message, "refusal", None) or part_refusal,
            prompt_tokens=getattr(usage, "prompt_tokens", None),
            completion_tokens=getattr(usage, "completion_tokens", None),
            thought=part_thought
            or any(beside)
            or bool(getattr(details, "reasoning_tokens", None))
            or without_thinking(text) != text.strip(),
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        raise TransientError("the body of the answer is no chat completion") from None


def _of_parts(content: Any) -> tuple[str, str, bool]:
    """Text and refusal of a content, and whether it has parts of another kind, which models think in. Raises TypeError for what is no content."""
    if content is None or isinstance(content, str):
        return content or "", "", False
    if not isinstance(content, list):
        raise TypeError
    texts, refusal, thought = [], "", False
    for part in content:
        if isinstance(part, str) or part["type"] in ("text", "output_text"):
            texts.append(part if isinstance(part, str) else part["text"])
        elif part["type"] == "refusal":
            refusal = part["refusal"]
        else:
            thought = True
    return "".join(texts), refusal, thought


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
