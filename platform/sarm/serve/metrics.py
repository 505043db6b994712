"""What Prometheus reads of a server. No label holds a text or a name that a request gave; latents are those of the watch list."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

from sarm.serve.batching import Read

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_REWARDS = (-5, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 4, 5)


class Metrics:
    """The server's own registry."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("sarm_requests", "Requests by route and status.", ["route", "status"], registry=self._registry)  # fmt: skip
        self._seconds = Histogram("sarm_request_seconds", "Time of a request.", ["route"], buckets=_SECONDS, registry=self._registry)  # fmt: skip
        self._queue_seconds = Histogram("sarm_queue_wait_seconds", "Time that an answer waited.", buckets=_SECONDS, registry=self._registry)  # fmt: skip
        self._rewards = Histogram("sarm_reward", "Standardised rewards of the base head.", buckets=_REWARDS, registry=self._registry)  # fmt: skip
        self._flags = Counter("sarm_flags", "Answers with a flag.", ["flag"], registry=self._registry)
        self._watched: Gauge | None = None
        self._info = Info("sarm_model", "Identity of the model.", registry=self._registry)

    def watched(self, latent: int, read: Callable[[], float]) -> None:
        """What a latent of the watch list adds to the mean reward."""
        if self._watched is None:
            self._watched = Gauge("sarm_drift_contribution", "What a watched latent added to the mean raw reward of the last step.", ["latent"], registry=self._registry)  # fmt: skip
        self._watched.labels(str(latent)).set_function(read)

    def gauge(self, name: str, about: str, read: Callable[[], float]) -> None:
        """A figure that is asked for when metrics are."""
        Gauge(name, about, registry=self._registry).set_function(read)

    def describe(self, **labels: str) -> None:
        """Which model is served."""
        self._info.info(labels)

    def note_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def note_flags(self, flags: Iterable[str]) -> None:
        """Count an answer's flags."""
        for flag in flags:
            self._flags.labels(flag).inc()

    def note_reward(self, value: float, read: Read) -> None:
        """Count an answer that was read."""
        self._rewards.observe(value)
        self._queue_seconds.observe(read.queue_seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        written: bytes = generate_latest(self._registry)
        return written
