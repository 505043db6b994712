"""The ASGI app: bodies read strictly and within limits, tokens checked, every error in its route's form, one line in the log for each.

Nothing of a body stands in a log line, a label or an address. The event loop never waits for the model.
"""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route as AsgiRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from sarm.contracts.untrusted import parse_json
from sarm.serve import drift_routes, try_page
from sarm.serve.engine import OverloadedError
from sarm.serve.faults import RequestError, own_error
from sarm.serve.other_sites import OwnSite
from sarm.serve.routes import ROUTES, Route
from sarm.serve.schemas import DriftQuery, DriftReset, Query, Variant
from sarm.serve.service import Service, overloaded

Body = TypeVar("Body", bound=BaseModel)
log = logging.getLogger("sarm.serve")
MAX_BODY = 16 << 20
# Of reading a body, from its headers on.
BODY_SECONDS = 10.0
_GONE = 499
# The page to try the model holds nothing of it, and asks for the token itself.
_OPEN = ("/health", "/ready", *try_page.PATHS)
_IN_PATH = "/t/"
_VARIANTS = "/v1/models/{model}/variants"
_DRIFT = "/v1/drift"


def make_app(service: Service, token: str | None = None, *, body_seconds: float = BODY_SECONDS) -> ASGIApp:
    """The app of one model. With a `token`, every route but `/health`, `/ready` and the page to try it wants it: as a bearer, or as `/t/TOKEN` before the path.

    Without one, requests of other sites' pages are refused (`other_sites`).
    """
    routes = [AsgiRoute(one.path, _endpoint(service, one, body_seconds), methods=["POST"]) for one in ROUTES]
    routes += [
        *(AsgiRoute(path, answer, methods=["GET"]) for path, answer in try_page.PATHS.items()),
        AsgiRoute("/health", _health, methods=["GET"]),
        AsgiRoute("/ready", _ready(service), methods=["GET"]),
        AsgiRoute("/metrics", _metrics(service), methods=["GET"]),
        AsgiRoute("/v1/models", _models(service), methods=["GET"]),
        AsgiRoute(_DRIFT, _drift(service, body_seconds), methods=["GET"]),
        AsgiRoute(_DRIFT + "/page", _drift(service, body_seconds), methods=["GET"]),
        AsgiRoute(_DRIFT + "/reset", _drift(service, body_seconds), methods=["POST"]),
        AsgiRoute(_VARIANTS, _admin(service, body_seconds), methods=["GET", "POST"]),
        AsgiRoute(_VARIANTS + "/{variant}", _admin(service, body_seconds), methods=["DELETE"]),
    ]
    app = Starlette(routes=routes, exception_handlers={404: _not_there, 405: _not_there})
    return OwnSite(app) if token is None else Guarded(app, token)


class Guarded:
    """Lets in who has the token."""

    def __init__(self, app: ASGIApp, token: str):
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        path: str = scope["path"]
        if path.startswith(_IN_PATH):
            own, _, rest = path.removeprefix(_IN_PATH).partition("/")
            given, path = own.encode("utf-8", "surrogateescape"), f"/{rest}"
            scope = {**scope, "path": path, "raw_path": path.encode("utf-8", "surrogateescape")}
        if hmac.compare_digest(given, self._token):
            await self._app(scope, receive, send)
            return
        route = next((one for one in ROUTES if one.path == path), None)
        error = RequestError(401, "unauthorised", "this route wants the server's token, as a bearer or as /t/TOKEN before the path")  # fmt: skip
        _tell(route.path if route else "other", error)
        form = route.error if route else own_error
        await JSONResponse(form(error), 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


def _endpoint(service: Service, route: Route, body_seconds: float) -> Callable[[Request], Any]:
    async def endpoint(request: Request) -> Response:
        started = time.monotonic()
        try:
            response = await _answered(service, route, request, body_seconds)
        except OverloadedError as error:
            response = _refusal(route, overloaded(error, route.overload))
        except RequestError as error:
            response = _refusal(route, error)
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        # A mistake of ours is told as one, without what was sent, and the service goes on.
        except Exception as error:
            response = _refusal(route, RequestError(500, "internal", f"the server failed with {type(error).__name__}"))
            log.debug("traceback", exc_info=error)
        service.metrics.note_request(route.path, response.status_code, time.monotonic() - started)
        return response

    return endpoint


async def _answered(service: Service, route: Route, request: Request, body_seconds: float) -> Response:
    body = _fitting(route.schema, await _body(request, body_seconds), route.invalid)
    query = _query(request, Query)
    work = asyncio.ensure_future(route.answer(service, body, query))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            # Nobody waits for the answer, so nobody computes it.
            raise ClientDisconnect
        content = work.result()
    finally:
        for task in (work, gone):
            task.cancel()
    headers = {"X-Sarm-Identity": service.about.identity, "X-Sarm-Scale": getattr(body, "scale", query.scale)}
    try:
        # In ASCII: an id that came with a lone surrogate goes back with it.
        text = json.dumps(content, allow_nan=False).encode()
    except ValueError:
        raise RequestError(500, "not_finite", "a reward is no finite number") from None
    return Response(text, media_type="application/json", headers=headers)


def _admin(service: Service, body_seconds: float) -> Callable[[Request], Any]:
    """Listing, posting and deleting of variants."""

    async def answered(request: Request) -> Any:
        if request.path_params["model"] != service.about.name:
            raise RequestError(404, "unknown_model", f"there is no such model; {service.about.name} is served")
        if request.method == "POST":
            return service.variants.post(_fitting(Variant, await _body(request, body_seconds), 422))
        if request.method == "DELETE":
            return service.variants.delete(request.path_params["variant"])
        return service.variants.listed()

    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await answered(request))
        except RequestError as error:
            _tell(_VARIANTS, error)
            return JSONResponse(own_error(error), error.status)

    return endpoint


def _drift(service: Service, body_seconds: float) -> Callable[[Request], Any]:
    """What the watch says, as JSON and as a page, and its reset."""

    async def answered(request: Request) -> Response:
        if request.method == "POST":
            asked = _fitting(DriftReset, await _body(request, body_seconds), 422)
            return JSONResponse(await asyncio.to_thread(drift_routes.reset, service, asked))
        query = _query(request, DriftQuery)
        if request.url.path.endswith("/page"):
            return HTMLResponse(await asyncio.to_thread(drift_routes.page, service, query))
        return JSONResponse(await asyncio.to_thread(drift_routes.drift, service, query))

    async def endpoint(request: Request) -> Response:
        try:
            return await answered(request)
        except RequestError as error:
            _tell(_DRIFT, error)
            return JSONResponse(own_error(error), error.status)

    return endpoint


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, seconds: float) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise _too_large()
    found = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                found += part
                if len(found) > MAX_BODY:
                    raise _too_large()
    except TimeoutError:
        raise RequestError(408, "slow_body", f"the body did not come within {seconds:.0f} s") from None
    return bytes(found)


def _too_large() -> RequestError:
    return RequestError(413, "too_large", f"the body has more than {MAX_BODY:,} bytes")


def _fitting(schema: type[Body], body: bytes, invalid: int) -> Body:
    """The body as its route wants it. Raises RequestError: 400 for what is no JSON, `invalid` for what does not fit."""
    try:
        found = parse_json(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        # What a JSON parser says may quote a key; a place is enough for the log.
        detail = f"the body is no JSON: {str(error)[:200]}" if not isinstance(error, UnicodeDecodeError) else ""
        raise RequestError(400, "malformed", "the body is no JSON in UTF-8", detail=detail) from None
    try:
        return schema.model_validate(found)
    except ValidationError as error:
        raise _misfit(error, invalid) from None
    except RecursionError:
        raise RequestError(400, "malformed", "the body is nested too deeply") from None


def _query(request: Request, schema: type[Body]) -> Body:
    names = [name for name, _ in request.query_params.multi_items()]
    if len(set(names)) < len(names):
        raise RequestError(422, "bad_query", "an option of the address is given twice")
    try:
        return schema.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise _misfit(error, 422) from None


def _misfit(error: ValidationError, status: int) -> RequestError:
    """Where the first thing that does not fit stands, and why, without what stands there."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part)[:40] for part in first["loc"]) or "the body"
    item = next((part for part in first["loc"] if isinstance(part, int)), None)
    message = f"{error.error_count()} fields do not fit"
    return RequestError(status, "bad_request", message, item=item, detail=f"{place}: {first['msg']}")


def _refusal(route: Route, error: RequestError) -> JSONResponse:
    _tell(route.path, error)
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    return JSONResponse(route.error(error), error.status, headers)


def _tell(path: str, error: RequestError) -> None:
    level = logging.ERROR if error.status >= 500 and error.code != "overloaded" else logging.WARNING
    place = "" if error.item is None else f" item {error.item}"
    log.log(level, "%s %d %s%s: %s", path, error.status, error.code, place, error.message)


async def _not_there(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    message = "there is no such route" if status == 404 else "this route wants another method"
    return JSONResponse(own_error(RequestError(status, "no_route", message)), status, getattr(error, "headers", None))


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "alive"})


def _ready(service: Service) -> Callable[[Request], Any]:
    async def ready(_: Request) -> Response:
        fault = service.engine.fault
        return JSONResponse({"status": fault or "ready"}, 503 if fault else 200)

    return ready


def _metrics(service: Service) -> Callable[[Request], Any]:
    async def metrics(_: Request) -> Response:
        # Gauges of the watch wait for it while it writes a step.
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return metrics


def _models(service: Service) -> Callable[[Request], Any]:
    async def models(_: Request) -> Response:
        about = {**service.about.as_json(), "max_length": service.about.max_length, "variants": service.heads.names}
        about |= {"reward_mean": service.about.reward_mean, "reward_std": service.about.reward_std}
        about |= {"feature_edits": service.about.feature_edits}
        return JSONResponse({"object": "list", "data": [{"id": service.about.name, "object": "model", **about}]})

    return models
