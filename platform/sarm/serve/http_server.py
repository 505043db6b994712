"""The HTTP server of `jobs/serve.py`: uvicorn's, with a time limit for headers, and an end by signals that it announces itself."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sarm.serve.try_page import TRY

# Headers have to come within this time of a connection, or of their first byte.
HEADER_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 75
_CONNECTIONS = 2048
# What is being computed is finished; what takes longer is given up.
_END_SECONDS = 20


class _Protocol(H11Protocol):
    """Closes a connection on which no request comes, or only a part of its headers."""

    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._waits is None:
            self._waits = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None


class _Server(uvicorn.Server):
    """Says where it serves once it does."""

    def __init__(self, config: uvicorn.Config, what: str, open_page: Callable[[str], object] | None):
        super().__init__(config)
        self._what, self._open = what, open_page

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _end(self, *_: object) -> None:
        # Asked twice, it waits for nobody.
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for taken in sockets or ():
            host, port = taken.getsockname()[:2]
            address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
            print(f"serving {self._what} on {address}", flush=True)
            print(f"a page to try it: {address}{TRY}", flush=True)
            if self._open is not None:
                self._open(f"{address}{TRY}")


def run(app: Any, taken: socket.socket, what: str, open_page: Callable[[str], object] | None = None) -> None:
    """Serve an app on a socket until SIGTERM or SIGINT. `open_page` is called with the address of the page to try it, once that is there."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_END_SECONDS,
        limit_concurrency=_CONNECTIONS,
    )
    _Server(config, what, open_page).run(sockets=[taken])
