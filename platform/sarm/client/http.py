"""Rewards of a server, over HTTP: connections are kept, and what may pass is tried again, as late as the server says."""

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx2

from sarm.client.rewards import Body, RewardError, Rewards

# Too busy, or between two starts. Whatever else is refused is refused again.
_AGAIN = (408, 425, 429, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_CONNECT_SECONDS = 10.0


class RewardClient(Rewards):
    """A client of the server at `url`. Options as `Rewards` takes them.

    What meets an overload, a restart or a broken connection is tried again until `timeout` seconds have passed since it was first sent; a
    request may be sent twice, since rewards depend on nothing else. `token` is the server's, if it has one.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 600.0, **options: Any):
        super().__init__(**options)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = timeout
        self._settings: dict[str, Any] = {
            "base_url": url.rstrip("/"),
            "headers": headers,
            "timeout": httpx2.Timeout(timeout, connect=_CONNECT_SECONDS),
            # A reward server is a neighbour: no proxy of the environment stands between.
            "trust_env": False,
        }
        self._sync = httpx2.Client(**self._settings)
        self._async: tuple[asyncio.AbstractEventLoop, httpx2.AsyncClient] | None = None

    def close(self) -> None:
        """Close its connections; those of a loop are closed by `aclose`."""
        self._sync.close()

    async def aclose(self) -> None:
        """Close its connections."""
        self._sync.close()
        if self._async is not None:
            await self._async[1].aclose()
            self._async = None

    def check(self) -> dict[str, Any]:
        """What the server says of its model: identity, template, tokenizer, variants. Raises RewardError."""
        found = self._sync.get("/v1/models")
        if found.status_code != 200:
            raise _error(found)
        about: dict[str, Any] = found.json()["data"][0]
        return about

    def _send(self, body: Body) -> Body:
        tries = _Tries(self._timeout)
        for _ in tries:
            try:
                response = self._sync.post("/v1/rewards", json=body)
            except httpx2.TransportError as error:
                time.sleep(tries.pause(error))
                continue
            if not _may_pass(response):
                return _content(response)
            time.sleep(tries.pause(response))
        raise tries.last

    async def _asend(self, body: Body) -> Body:
        tries = _Tries(self._timeout)
        for _ in tries:
            try:
                response = await self._of_loop().post("/v1/rewards", json=body)
            except httpx2.TransportError as error:
                await asyncio.sleep(tries.pause(error))
                continue
            if not _may_pass(response):
                return _content(response)
            await asyncio.sleep(tries.pause(response))
        raise tries.last

    def _of_loop(self) -> httpx2.AsyncClient:
        """Connections belong to the loop that made them, and training frameworks start several."""
        loop = asyncio.get_running_loop()
        if self._async is None or self._async[0] is not loop:
            self._async = loop, httpx2.AsyncClient(**self._settings)
        return self._async[1]


class _Tries:
    """Tries of one request until its time is over."""

    def __init__(self, timeout: float):
        self._ends, self._pause = time.monotonic() + timeout, _FIRST_PAUSE
        self.last: RewardError = RewardError("no time was left to ask the server", code="timeout")

    def __iter__(self) -> Iterator[None]:
        while True:
            yield
            if time.monotonic() >= self._ends:
                return

    def pause(self, failure: httpx2.Response | Exception) -> float:
        """Seconds until the next try: what the server says, else twice as long as before; some of it is chance, so that clients spread.

        Raises RewardError if the time would be over by then.
        """
        if isinstance(failure, Exception):
            self.last = RewardError(f"the server cannot be reached: {type(failure).__name__}: {failure}", code="unreachable")  # fmt: skip
        else:
            self.last = _error(failure)
        said = failure.headers.get("retry-after", "") if isinstance(failure, httpx2.Response) else ""
        if said.isdigit():
            seconds = int(said) * (1 + 0.1 * random.random())
        else:
            seconds, self._pause = self._pause * (0.5 + random.random()), min(_LONGEST_PAUSE, 2 * self._pause)
        if time.monotonic() + seconds > self._ends:
            raise self.last
        return seconds


def _may_pass(response: httpx2.Response) -> bool:
    """Whether the same request may be answered later: so says the status, or a 500 that is not the server's own, whose replica has died."""
    is_json = response.headers.get("content-type", "").startswith("application/json")
    return response.status_code in _AGAIN or (response.status_code == 500 and not is_json)


def _content(response: httpx2.Response) -> Body:
    if response.status_code != 200:
        raise _error(response)
    found: Body = response.json()
    return found


def _error(response: httpx2.Response) -> RewardError:
    """What an error's body says, whoever wrote it."""
    try:
        found = response.json()["error"]
        code, message, item = found["code"], found["message"], found.get("item")
    except (ValueError, KeyError, TypeError, AttributeError):
        code, message, item = "http", response.text[:200], None
    return RewardError(f"{response.status_code} {code}: {message}", status=response.status_code, code=code, item=item)
