"""`GET /try`: a page on which people try the model: a prompt, two answers, their rewards as sums, and other weights for some features.

It is the same for every model, and holds nothing of it. What it shows it asks of `/v1/models` and `/v1/card`, with the token that was typed
into it as a header.
"""

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from sarm.report.try_page import try_page

TRY = "/try"
_HEADERS = {
    # Beside the policy that stands in the page: this counts in a header alone, and keeps the page out of other sites' frames.
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


async def _start(_: Request) -> Response:
    # Relative: a proxy may have put a path before it.
    return RedirectResponse(TRY.removeprefix("/"))


async def _try(_: Request) -> Response:
    return HTMLResponse(try_page(), headers=_HEADERS)


PATHS = {"/": _start, TRY: _try}
"""Who has no token may open them."""
