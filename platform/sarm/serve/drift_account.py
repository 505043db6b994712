"""What the watch says of its streams, as JSON: for the routes, the page and MLflow, and for the other replicas of a server."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from sarm.audit.drift_stream import concentration, suspects
from sarm.serve.heads import BASE, Heads
from sarm.serve.names import Names
from sarm.serve.schemas import DriftQuery
from sarm.serve.watch import Key, Watch, Watched
from sarm.serve.watched_answers import Origin, Seen
from sarm.settings.started import called

_CONTEXTS = 3


@runtime_checkable
class Account(Protocol):
    """The watch as a service needs it: in this process (`DriftAccount`), or one for all replicas (`SharedWatch`)."""

    def note(self, origin: Origin, seen: list[Seen]) -> None:
        """Take answers; never waits."""

    def streams(self, query: DriftQuery) -> list[dict[str, Any]]:
        """The streams that the query names, all of them if it names none."""

    def reset(self, query: DriftQuery) -> list[dict[str, str]]:
        """Begin them anew; which they were."""

    def figures(self, latents: tuple[int, ...] = ()) -> dict[str, float]:
        """For Prometheus: `alarms`, `unwatched`, `streams`, and of each latent what it adds to the last step of the latest stream."""

    def close(self) -> None:
        """End its threads, after what waits."""


@dataclass(frozen=True)
class DriftAccount:
    """The watch of one model in this process. `model` is the name under which it is served."""

    watch: Watch
    heads: Heads
    names: Names
    model: str

    def note(self, origin: Origin, seen: list[Seen]) -> None:
        """Take answers; never waits."""
        self.watch.note(origin, seen)

    def streams(self, query: DriftQuery) -> list[dict[str, Any]]:
        """The streams that the query names, all of them if it names none."""
        with self.watch.reading() as streams:
            return [self.content(key, own, query.top) for key, own in streams.items() if _matches(key, query)]

    def reset(self, query: DriftQuery) -> list[dict[str, str]]:
        """Begin them anew, so that the steps that follow are their baseline; which they were."""
        done = self.watch.reset(lambda key: _matches(key, query))
        return [{"run": key.run, "split": key.split, "variant": key.variant} for key in done]

    def figures(self, latents: tuple[int, ...] = ()) -> dict[str, float]:
        """For Prometheus."""
        watch = self.watch
        found = {"alarms": watch.num_alarms, "unwatched": watch.num_unwatched, "streams": watch.num_streams}
        return {**found, **dict(zip(map(str, latents), watch.last_contributions(latents), strict=True))}

    def close(self) -> None:
        """End its thread, after what waits."""
        self.watch.close()

    def content(self, key: Key, watched: Watched, top: int) -> dict[str, Any]:
        """One stream as JSON; the watch's lock is held. Rewards and contributions are raw."""
        stream, names = watched.stream, self.names
        shifts = stream.shifts()
        paid = [{"name": names.of(one.latent), **vars(one)} for one in stream.paid(top)]
        first = [latent for latent in suspects(stream) if any(one.latents for one in stream.alarms)]
        alarms = [
            {
                **alarm.as_json(),
                "latents": [{"name": names.of(one.latent), **vars(one)} for one in alarm.latents],
                "rollouts": shown["rollouts"],
            }
            for alarm, shown in zip(stream.alarms, [*watched.rollouts, *[{"rollouts": []}] * len(stream.alarms)], strict=False)
        ]  # fmt: skip
        return {
            **key._asdict(),
            "state": "alarm" if stream.alarms else "watching" if stream.is_watching else "baseline",
            "steps": stream.num_steps,
            "answers": stream.num_answers,
            "last_step": stream.last_step if stream.num_steps else None,
            "open_steps": list(watched.steps),
            "open_answers": sum(map(len, watched.steps.values())),
            "shift": float(shifts.shift.sum()) if shifts is not None else None,
            "concentration": concentration(shifts) if shifts is not None else None,
            "signals": stream.signals(),
            "paid": paid,
            "alarms": alarms,
            "suspects": [{"latent": latent, "name": names.of(latent), "contexts": names.contexts(latent, _CONTEXTS)} for latent in first],
            "answer": self._answering(key, first),
            "history": list(stream.history),
        }  # fmt: skip

    def _answering(self, key: Key, latents: list[int]) -> dict[str, Any] | None:
        """The edit that would take the suspects out of the reward: as a command, and as what `POST .../variants` takes."""
        if not latents or key.variant not in self.heads.names:
            return None
        weight_S = self.heads.weights(BASE)
        edited = [{"latent": one, "before": float(weight_S[one]), "after": 0.0} for one in latents]
        name = f"without-{'-'.join(map(str, latents))}"
        return {
            "command": f"{called('steer')} --name {name} --edit zero --features {' '.join(map(str, latents))}",
            "path": f"/v1/models/{self.model}/variants",
            "variant": {"name": name, "weights": edited},
        }


def _matches(key: Key, query: DriftQuery) -> bool:
    return all(
        asked is None or asked == own
        for asked, own in ((query.run, key.run), (query.split, key.split), (query.variant, key.variant))
    )
