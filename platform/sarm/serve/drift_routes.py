"""`GET /v1/drift`, its page, and `POST /v1/drift/reset`: what the watch says of the streams of this server."""

from typing import Any

from sarm.report.drift_page import drift_page
from sarm.serve.faults import RequestError
from sarm.serve.schemas import DriftQuery, DriftReset
from sarm.serve.service import Service


def drift(service: Service, query: DriftQuery) -> dict[str, Any]:
    """The streams that the query names, all of them if it names none. Raises RequestError: 404 for one that is not there."""
    found = service.account.streams(query)
    if not found and (query.run or query.split or query.variant):
        raise _unknown()
    return {"streams": found}


def page(service: Service, query: DriftQuery) -> str:
    """The same for people, as one HTML file. Raises as `drift`."""
    return drift_page(drift(service, query)["streams"], service.about.name)


def reset(service: Service, asked: DriftReset) -> dict[str, Any]:
    """Begin streams anew, so that the steps that follow are their baseline."""
    done = service.account.reset(DriftQuery(run=asked.run, split=asked.split, variant=asked.variant))
    if not done:
        raise _unknown()
    return {"reset": done}


def _unknown() -> RequestError:
    return RequestError(404, "unknown_stream", "no answers of such a run, split and variant have been watched")
