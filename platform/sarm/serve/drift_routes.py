"""`GET /v1/drift`, its page, and `POST /v1/drift/reset`: what the watch says of the streams of this server."""

from typing import Any

from sarm.audit.drift_stream import concentration, suspects
from sarm.report.drift_page import drift_page
from sarm.serve.faults import RequestError
from sarm.serve.heads import BASE
from sarm.serve.schemas import DriftQuery, DriftReset
from sarm.serve.service import Service
from sarm.serve.watch import Key, Watched

_CONTEXTS = 3


def drift(service: Service, query: DriftQuery) -> dict[str, Any]:
    """The streams that the query names, all of them if it names none. Raises RequestError: 404 for one that is not there."""
    with service.watch.reading() as streams:
        found = {key: watched for key, watched in streams.items() if _matches(key, query)}
        if not found and (query.run or query.split or query.variant):
            raise RequestError(404, "unknown_stream", "no answers of such a run, split and variant have been watched")
        return {"streams": [content(service, key, watched, query.top) for key, watched in found.items()]}


def page(service: Service, query: DriftQuery) -> str:
    """The same for people, as one HTML file. Raises as `drift`."""
    return drift_page(drift(service, query)["streams"], service.about.name)


def reset(service: Service, asked: DriftReset) -> dict[str, Any]:
    """Begin streams anew, so that the steps that follow are their baseline."""
    query = DriftQuery(run=asked.run, split=asked.split, variant=asked.variant)
    done = service.watch.reset(lambda key: _matches(key, query))
    if not done:
        raise RequestError(404, "unknown_stream", "no answers of such a run, split and variant have been watched")
    return {"reset": [{"run": key.run, "split": key.split, "variant": key.variant} for key in done]}


def content(service: Service, key: Key, watched: Watched, top: int) -> dict[str, Any]:
    """One stream as JSON; the watch's lock is held. Rewards and contributions are raw."""
    stream, names = watched.stream, service.names
    shifts = stream.shifts()
    paid = [{"name": names.of(one.latent), **vars(one)} for one in stream.paid(top)]
    first = [latent for latent in suspects(stream) if any(one.latents for one in stream.alarms)]
    weight_S = service.heads.weights(key.variant) if key.variant in service.heads.names else None
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
        "shift": float(shifts.shift.sum()) if shifts is not None else None,
        "concentration": concentration(shifts) if shifts is not None else None,
        "signals": stream.signals(),
        "paid": paid,
        "alarms": alarms,
        "suspects": [{"latent": latent, "name": names.of(latent), "contexts": names.contexts(latent, _CONTEXTS)} for latent in first],
        "answer": _answering(service, key, first, weight_S),
        "history": list(stream.history),
    }  # fmt: skip


def _answering(service: Service, key: Key, latents: list[int], weight_S: Any) -> dict[str, Any] | None:
    """The edit that would take the suspects out of the reward: as a command, and as what `POST .../variants` takes."""
    if not latents or weight_S is None:
        return None
    edited = [{"latent": one, "before": float(service.heads.weights(BASE)[one]), "after": 0.0} for one in latents]
    name = f"without-{'-'.join(map(str, latents))}"
    return {
        "command": f"python jobs/steer.py --name {name} --edit zero --features {' '.join(map(str, latents))}",
        "path": f"/v1/models/{service.about.name}/variants",
        "variant": {"name": name, "weights": edited},
    }


def _matches(key: Key, query: DriftQuery) -> bool:
    return all(
        asked is None or asked == own
        for asked, own in ((query.run, key.run), (query.split, key.split), (query.variant, key.variant))
    )
