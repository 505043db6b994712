"""The process of `jobs/serve.py`: a socket that is taken before weights are read, an orderly end on SIGTERM and Ctrl-C."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

from sarm.settings.checks import UserError
from sarm.settings.serving import Serving

# Headers have to come within this time of a connection, as bodies do of their headers.
_HEADER_SECONDS, _KEEP_ALIVE_SECONDS = 10.0, 75
_CONNECTIONS = 2048
# What is being computed is finished; what takes longer is given up.
_END_SECONDS = 20


def serve(settings: Serving) -> None:
    """Serve until the process is asked to end.

    Raises UserError as `load_service` does, for a port that is taken and for a token that cannot be read.
    """
    token = settings.read_token()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        _serve(settings, token)
    # While weights are read; later the server answers both signals itself.
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    print("the server has ended", flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _serve(settings: Serving, token: str | None) -> None:
    with listening(settings) as taken:
        # Torch and transformers take seconds, which nobody waits for whose port is taken.
        from sarm.serve.app import make_app
        from sarm.serve.loading import load_service

        _log(is_loud=settings.debug)
        service = load_service(settings)
        try:
            _run(make_app(service, token), taken, settings)
        finally:
            service.close()


@contextlib.contextmanager
def listening(settings: Serving) -> Iterator[socket.socket]:
    """The server's socket, taken. Raises UserError for a port that is in use, or an address that is not this machine's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((settings.host, settings.port))
            # Two that are bound and do not listen would share a port.
            taken.listen()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot listen on {settings.host} port {settings.port}: {reason}. Pass another --port, or 0 for a free one.") from error  # fmt: skip
        yield taken


def _run(app: Any, taken: socket.socket, settings: Serving) -> None:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
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
                self._waits = self.loop.call_later(_HEADER_SECONDS, self.transport.close)

        def _unwatch(self) -> None:
            if self._waits is not None:
                self._waits.cancel()
                self._waits = None

    class Server(uvicorn.Server):
        """Ends by its signals, and says so itself."""

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
            host, port = taken.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {settings.model} on http://{shown}:{port}", flush=True)

    config = uvicorn.Config(
        app,
        http=Protocol,
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
    Server(config).run(sockets=[taken])


def _log(*, is_loud: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%H:%M:%S"))
    for name, level in (("sarm.serve", logging.DEBUG if is_loud else logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
