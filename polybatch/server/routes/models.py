"""/v1/models: the base model and every adapter."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from polybatch.server.auth import caller_of
from polybatch.server.interface.answers import Model, ModelList
from polybatch.server.names import unknown_model
from polybatch.server.openapi import describe
from polybatch.server.state import ServerState, state_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", **describe(ModelList))
async def list_models(request: Request) -> JSONResponse:
    """All models: the base model's names first, then adapters, each with its base as `parent`."""
    return JSONResponse({"object": "list", "data": _models(request)})


@router.get("/v1/models/{model:path}", **describe(Model, 404))
async def get_model(request: Request, model: str) -> JSONResponse:
    """One model by its id."""
    for entry in _models(request):
        if entry["id"] == model:
            return JSONResponse(entry)
    raise unknown_model(model, state_of(request).config.served_model_names, _adapters(request))


def _adapters(request: Request) -> list[str]:
    """The adapters that the caller's tenant may use; there are no others for it."""
    state = state_of(request)
    return sorted(state.tenants.visible(caller_of(request).tenant, state.llm.adapter_paths))


def _models(request: Request) -> list[dict[str, Any]]:
    state = state_of(request)
    names = state.config.served_model_names
    bases = [_entry(state, name, state.llm.model, None) for name in names]
    adapters = [(name, state.llm.adapter_paths[name]) for name in _adapters(request)]
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
