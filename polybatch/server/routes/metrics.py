"""/metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from polybatch.server.auth import require_watcher
from polybatch.server.metrics import render
from polybatch.server.openapi import PLAIN_TEXT, describe
from polybatch.server.state import state_of

router = APIRouter(tags=["operations"])


@router.get("/metrics", dependencies=[Depends(require_watcher)], **describe(also=PLAIN_TEXT))
async def metrics(request: Request) -> Response:
    """All metrics, without those of the engine while it is away. With a metrics key or an admin key."""
    state = state_of(request)
    body, content_type = render(state, await state.view.look(), request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type})
