"""An ASGI app in several replicas behind one address, by Ray Serve. What the app does is its builder's business.

Serve neither batches nor queues here: requests go to a replica as they come, and the app admits or refuses them, since it knows how long they
would wait. A replica that dies is replaced; what it was computing gets an error without a body of the app's, and its client comes again.

What all replicas have in common is made once, in a process of its own beside them, whose methods they call. It is replaced as they are.
"""

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from sarm.engine.ray.cluster import connect
from sarm.settings.checks import UserError
from sarm.settings.run import RunSettings

if TYPE_CHECKING:
    from ray.serve import Application

NAME, COMMON = "rewards", "common"
# Of one replica at a time; the app refuses what would wait too long.
_REQUESTS = 4096
# A token may stand in a path.
_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
_HEALTH_SECONDS, _GRACE_SECONDS = 5.0, 20.0


class Replicated(Protocol):
    """What a builder makes in every replica."""

    @property
    def app(self) -> Any:
        """ASGI."""

    def fault(self) -> str:
        """Why this replica cannot go on; empty if it can."""

    def close(self) -> None:
        """End its threads."""


class Closable(Protocol):
    """What all replicas have in common."""

    def close(self) -> None:
        """End its threads."""


class Handle:
    """How a replica calls what all have in common, from any thread but the event loop's."""

    def __init__(self, deployment: Any):
        self._deployment = deployment

    def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """What the method returns. Raises what it does, TimeoutError, and whatever Ray does while it is replaced."""
        return self._deployment.call.remote(method, *arguments).result(timeout_s=seconds)


def application(
    build: Callable[[Handle], Replicated],
    build_common: Callable[[], Closable],
    *,
    replicas: int,
    max_replicas: int | None,
    cpus: float,
    gpus: float,
) -> "Application":
    """The app as Ray Serve deploys it: `replicas`, or from `replicas` to `max_replicas` as requests come. `cpus` and `gpus` are each replica's.

    Raises UserError if Ray Serve is not installed.
    """
    serve = _serve()

    @serve.ingress()
    class Replica:
        def __init__(self, common: Any) -> None:
            self._made = build(Handle(common))

        def __serve_build_asgi_app__(self) -> Any:
            return self._made.app

        async def check_health(self) -> None:
            if fault := await asyncio.to_thread(self._made.fault):
                raise RuntimeError(fault)

        def __del__(self) -> None:
            self._made.close()

    options: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None and max_replicas > replicas:
        options = {"autoscaling_config": {"min_replicas": replicas, "max_replicas": max_replicas, "target_ongoing_requests": 16}}  # fmt: skip
    deployment: Any = serve.deployment(
        name=NAME,
        max_ongoing_requests=_REQUESTS,
        max_queued_requests=-1,
        logging_config=_LOGGING,
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=_GRACE_SECONDS,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **options,
    )(Replica)
    made: Application = deployment.bind(_common(serve, build_common))
    return made


def _common(serve: Any, build: Callable[[], Closable]) -> Any:
    """The deployment of what all replicas have in common: one process, which Serve replaces when it dies."""

    class Common:
        def __init__(self) -> None:
            self._made = build()

        async def call(self, method: str, *arguments: Any) -> Any:
            return await asyncio.to_thread(getattr(self._made, method), *arguments)

        def __del__(self) -> None:
            self._made.close()

    deployment: Any = serve.deployment(
        name=COMMON,
        num_replicas=1,
        max_ongoing_requests=_REQUESTS,
        logging_config=_LOGGING,
        health_check_period_s=_HEALTH_SECONDS,
        # It computes little, and replicas have the cores.
        ray_actor_options={"num_cpus": 0},
    )(Common)
    return deployment.bind()


def serve_replicas(
    build: Callable[[Handle], Replicated],
    build_common: Callable[[], Closable],
    *,
    host: str,
    port: int,
    replicas: int,
    max_replicas: int | None = None,
    threads: int | None = None,
    ray_address: str = "",
    ready: Callable[[str], None] = print,
) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called with the address once every replica is loaded.

    Raises UserError if Ray Serve is not installed, the port is taken, a replica fails to load, or the cluster has no room.
    """
    serve = _serve()
    ended = threading.Event()
    before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with connect(RunSettings(ray_address=ray_address)) as cluster:
            cpus = threads or max(1, int(cluster.num_cpus) // (max_replicas or replicas))
            gpus = 1.0 if cluster.num_gpus else 0.0
            serve.start(http_options={"host": host, "port": port, "request_timeout_s": None}, logging_config=_LOGGING)
            try:
                app = application(
                    build, build_common, replicas=replicas, max_replicas=max_replicas, cpus=cpus, gpus=gpus
                )
                _run(serve, app)
                ready(f"http://{host}:{port}")
                while not ended.wait(0.2):
                    pass
            finally:
                serve.shutdown()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _run(serve: Any, app: "Application") -> None:
    began = time.monotonic()
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-400:]
        raise UserError(f"the replicas did not start within {time.monotonic() - began:.0f} s: {reason}. Look at Ray's logs, or serve without --replicas.") from error  # fmt: skip


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise UserError(f"Ray Serve is not installed ({error}): pip install 'sarm[train]', or leave --replicas out.") from error  # fmt: skip
    return serve
