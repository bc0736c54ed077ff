"""/dashboard: a page that shows what the engine does, and the data that it asks for.

The page is plain files of this package; nothing comes from elsewhere, and its policy says so to the browser.
"""

from __future__ import annotations

from importlib import resources

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from polybatch.errors import RequestError
from polybatch.server.auth import caller_of
from polybatch.server.batches.pages import check_query
from polybatch.server.browsers import DASHBOARD
from polybatch.server.dashboard_data import dashboard_data
from polybatch.server.errors import HttpError
from polybatch.server.openapi import describe, parameter
from polybatch.server.state import state_of

router = APIRouter(tags=["operations"])

FILES = {
    "index.html": "text/html",
    "style.css": "text/css",
    "app.js": "text/javascript",
    "charts.js": "text/javascript",
    "panels.js": "text/javascript",
    "vendor/uPlot.iife.min.js": "text/javascript",
    "vendor/uPlot.min.css": "text/css",
    "vendor/LICENSE.uPlot.txt": "text/plain",
}
MAX_DIGITS = 18
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


AFTER = parameter(
    "after", "Index of the last step that is known.", {"type": "integer", "minimum": -1, "default": -1}
)
HTML = {"text/html": {"schema": {"type": "string"}}}
DATA = {"application/json": {"schema": {"type": "object", "description": "For the page; it may change."}}}


@router.get(DASHBOARD, **describe(also=HTML))
async def page() -> Response:
    """The page itself."""
    return _file("index.html")


@router.get(f"{DASHBOARD}/data", **describe(None, 400, parameters=[AFTER], also=DATA))
async def data(request: Request) -> Response:
    """What the page shows. after: index of the last step that it has, -1 for none."""
    state = state_of(request)
    check_query(request.query_params, [AFTER])
    after_step = _after(request)
    found = dashboard_data(state, await state.view.look(), caller_of(request), after_step)
    return Response(
        msgspec.json.encode(found), media_type="application/json", headers={"Cache-Control": "no-store"}
    )


@router.get(f"{DASHBOARD}/{{name:path}}", include_in_schema=False)
async def asset(name: str) -> Response:
    """A file of the page."""
    return _file(name)


def _after(request: Request) -> int:
    text = request.query_params.get("after", "-1")
    if not text.removeprefix("-").isdecimal() or len(text) > MAX_DIGITS or int(text) < -1:
        raise RequestError(f"after is {text[:80]!r}; it must be the number of a step, or -1", field="after")
    return int(text)


def _file(name: str) -> Response:
    """One of `FILES`, which is a closed list: what a client names never becomes a path."""
    if name not in FILES:
        raise HttpError(404, f"the dashboard has no file {name[:100]!r}", code="not_found")
    content = resources.files("polybatch.server").joinpath("dashboard", name).read_bytes()
    return Response(content, media_type=f"{FILES[name]}; charset=utf-8", headers=HEADERS)
