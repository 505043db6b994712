"""What a server without a token refuses to browsers: requests that another site's page makes it send.

A page of any site may let its visitor's browser POST to an address of the visitor's own machine (cross-site request forgery). The browser then
names the page's site in `Origin`. A site may also make its own name point to this machine (DNS rebinding), so that its pages are of the same
origin as the server. The browser then names that site in `Host`. A token is safe from both, because no other site knows it.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sarm.serve.faults import RequestError, own_error


class OwnSite:
    """Lets in what comes from no site or from the server's own, under a name that nobody else can give to this machine."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = None
        if scope["type"] == "http":
            # Once more under one name would be read by one party so and by another so.
            origins, hosts = ([value.decode("latin-1") for name, value in scope["headers"] if name == wanted] for wanted in (b"origin", b"host"))  # fmt: skip
            fault = fault_of(origins, hosts)
        if fault is None:
            await self._app(scope, receive, send)
        else:
            await JSONResponse(own_error(fault), fault.status)(scope, receive, send)


def fault_of(origins: list[str], hosts: list[str]) -> RequestError | None:
    """Why a request with these headers `Origin` and `Host` is refused, None where it is not."""
    if any(not is_own_name(host) for host in hosts):
        return RequestError(403, "other_site", "the request names this server by a name of the domain name system, which any site could give to this machine; ask for localhost or an IP address, or start the server with --token")  # fmt: skip
    if any(_place(origin) is None or {_place(origin)} != {host.lower() for host in hosts} for origin in origins):
        return RequestError(403, "other_site", "a page of another site sent this request; start the server with --token if such a page may ask it")  # fmt: skip
    return None


def is_own_name(host: str) -> bool:
    """Whether `Host` (NAME or NAME:PORT) names a machine in a way that is not looked up in public: by address, as localhost, or without a dot."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        name = name.removesuffix(".")
        return "." not in name or name.endswith(".localhost")
    return True


def _place(origin: str) -> str | None:
    """NAME or NAME:PORT of an origin; None for `null`, which is what a browser says of a page without one."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
