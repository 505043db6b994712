"""The process of `jobs/serve.py`: a socket that is taken before weights are read, an orderly end on SIGTERM and Ctrl-C."""

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sarm.settings.checks import UserError
from sarm.settings.serving import Serving

if TYPE_CHECKING:
    from sarm.serve.service import Service


def serve(
    settings: Serving,
    loaded: "Callable[[Service], object] | None" = None,
    open_page: Callable[[str], object] | None = None,
) -> None:
    """Serve until the process is asked to end.

    `loaded` is called with the service before it is asked anything, `open_page` with the address of the page to try it, once that is there.

    Raises UserError as `load_service` does, for a port that is taken and for a token that cannot be read.
    """
    token = settings.read_token()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        _serve(settings, token, loaded, open_page)
    # While weights are read; later the server answers both signals itself.
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    print("the server has ended", flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _serve(
    settings: Serving,
    token: str | None,
    loaded: "Callable[[Service], object] | None",
    open_page: Callable[[str], object] | None,
) -> None:
    if not settings.model.is_dir():
        raise UserError(f"no model folder {settings.model}. Pass --model with a folder that holds a SARM.")
    with listening(settings) as taken:
        from sarm.passes.models import sarm_settings

        sarm_settings(settings.model)
        # Torch and transformers take seconds, for which nobody waits whose port is taken or whose folder is of another kind.
        from sarm.serve.app import make_app
        from sarm.serve.http_server import run
        from sarm.serve.loading import leave_cores_to_the_engine, load_service

        _log(is_loud=settings.debug)
        leave_cores_to_the_engine()
        service = load_service(settings)
        if loaded is not None:
            loaded(service)
        try:
            what = f"{settings.model}, ready {service.ready_seconds:.1f} s after its weights were read,"
            run(make_app(service, token), taken, what, open_page)
        finally:
            service.close()


@contextlib.contextmanager
def listening(settings: Serving) -> Iterator[socket.socket]:
    """The server's socket, taken. Raises UserError for a port that is in use, or an address that is not this machine's."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol's number: asyncio takes no other for TCP, and without TCP_NODELAY an answer waits 40 ms for its own beginning's receipt.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((settings.host, settings.port))
            # Two that are bound and do not listen would share a port.
            taken.listen()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot listen on {settings.host} port {settings.port}: {reason}. Pass another --port, or 0 for a free one.") from error  # fmt: skip
        yield taken


def _log(*, is_loud: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(levelname)s %(message)s", "%H:%M:%S"))
    for name, level in (("sarm.serve", logging.DEBUG if is_loud else logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
