"""/health: is this process alive; /ready: will a request be served; /version."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from polybatch import __version__
from polybatch.server.errors import RETRY_AFTER_DOWN_S
from polybatch.server.interface.answers import Health, Readiness, Version
from polybatch.server.openapi import also_as, describe
from polybatch.server.state import state_of

router = APIRouter(tags=["health"])

READY = describe(Readiness)
READY["responses"][503] = also_as(Readiness, "Not ready; `reason` says why.")


@router.get("/health", **describe(Health))
async def health() -> JSONResponse:
    """200 as long as this process answers; it ends by itself when the engine cannot be brought back."""
    return JSONResponse({"status": "ok"})


@router.get("/ready", **READY)
async def ready(request: Request) -> JSONResponse:
    """200 if the engine process was heard lately and its steps go on, else 503 with the reason."""
    state = state_of(request)
    found = state.llm.health()
    is_ready = found.is_ready and not state.is_draining
    reason = "the server is shutting down" if state.is_draining else found.reason
    return JSONResponse(
        {**asdict(found), "is_ready": is_ready, "reason": reason},
        status_code=200 if is_ready else 503,
        headers=None if is_ready else {"Retry-After": str(RETRY_AFTER_DOWN_S)},
    )


@router.get("/version", **describe(Version))
async def version() -> JSONResponse:
    """The version of the server."""
    return JSONResponse({"version": __version__})
