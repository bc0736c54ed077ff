"""/health: is this process alive; /ready: will a request be served; /version."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from polybatch import __version__
from polybatch.server.state import state_of

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> JSONResponse:
    """200 as long as this process answers; it ends by itself when the engine cannot be brought back."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 if the engine process was heard lately and its steps go on, else 503 with the reason."""
    state = state_of(request)
    found = state.llm.health()
    is_ready = found.is_ready and not state.is_draining
    reason = "the server is shutting down" if state.is_draining else found.reason
    return JSONResponse(
        {**asdict(found), "is_ready": is_ready, "reason": reason}, status_code=200 if is_ready else 503
    )


@router.get("/version")
async def version() -> JSONResponse:
    return JSONResponse({"version": __version__})
