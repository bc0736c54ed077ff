"""/v1/models: the base model and every adapter."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from polybatch.server.names import unknown_model
from polybatch.server.state import ServerState, state_of

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request) -> JSONResponse:
    """All models: the base model's names first, then adapters, each with its base as `parent`."""
    return JSONResponse({"object": "list", "data": _models(state_of(request))})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str) -> JSONResponse:
    """One model by its id."""
    state = state_of(request)
    for entry in _models(state):
        if entry["id"] == model:
            return JSONResponse(entry)
    raise unknown_model(model, state.config.served_model_names, state.llm.adapter_paths)


def _models(state: ServerState) -> list[dict[str, Any]]:
    names = state.config.served_model_names
    bases = [_entry(state, name, state.llm.model, None) for name in names]
    adapters = sorted(state.llm.adapter_paths.items())
    return bases + [_entry(state, name, path, names[0]) for name, path in adapters]


def _entry(state: ServerState, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started_s,
        "owned_by": "polybatch",
        "root": root,
        "parent": parent,
        "max_model_len": state.llm.max_model_len,
    }
