"""/metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from polybatch.server.metrics import render
from polybatch.server.openapi import PLAIN_TEXT, describe
from polybatch.server.state import state_of

router = APIRouter(tags=["operations"])


@router.get("/metrics", **describe(also=PLAIN_TEXT))
async def metrics(request: Request) -> Response:
    """All metrics, without those of the engine while it is away."""
    state = state_of(request)
    body, content_type = render(state, await state.view.look(), request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
