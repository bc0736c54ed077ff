"""The ASGI application: routes, the gate before them, one form of error."""

from __future__ import annotations

from fastapi import FastAPI

from polybatch import __version__
from polybatch.server.errors import install_handlers
from polybatch.server.gate import Gate
from polybatch.server.metrics import HttpMeter
from polybatch.server.openapi import DocumentedAPI
from polybatch.server.routes import (
    adapters,
    batches,
    completions,
    dashboard,
    files,
    health,
    metrics,
    models,
    tokens,
)
from polybatch.server.state import ServerState

ROUTERS = (
    completions.router, files.router, batches.router, models.router, adapters.router, tokens.router,
    health.router, metrics.router, dashboard.router,
)  # fmt: skip


def create_app(state: ServerState) -> FastAPI:
    """An application over a started engine; whoever made the state closes it."""
    app = DocumentedAPI(
        has_keys=not state.keys.is_open, title="Polybatch", version=__version__, docs_url=None, redoc_url=None
    )
    app.state.server = state
    for router in ROUTERS:
        app.include_router(router)
    install_handlers(app)
    app.add_middleware(Gate, config=state.config, keys=state.keys)
    app.add_middleware(HttpMeter, meter=state.meter)
    return app
