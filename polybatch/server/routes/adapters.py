"""/v1/load_lora_adapter and /v1/unload_lora_adapter, for administrators."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Depends, Request
from starlette.responses import PlainTextResponse

from polybatch.errors import RequestError
from polybatch.server.auth import require_admin
from polybatch.server.bodies import decode_as, read_body
from polybatch.server.config import ServerConfig
from polybatch.server.errors import HttpError
from polybatch.server.interface.requests import LoadAdapterRequest, UnloadAdapterRequest
from polybatch.server.openapi import PLAIN_TEXT, describe
from polybatch.server.state import state_of

router = APIRouter(tags=["adapters"], dependencies=[Depends(require_admin)])


@router.post("/v1/load_lora_adapter", **describe(None, 503, body=LoadAdapterRequest, also=PLAIN_TEXT))
async def load_lora_adapter(request: Request) -> PlainTextResponse:
    """Register a PEFT folder below one of the allowed roots."""
    state = state_of(request)
    body = decode_as(await read_body(request, state.config), LoadAdapterRequest)
    name = body.lora_name
    if name in state.config.served_model_names:
        raise RequestError(f"lora_name {name!r} is the base model's: choose another", field="lora_name")
    if name in state.llm.adapter_paths and not body.load_inplace:
        raise RequestError(
            f"lora_name {name!r} is in use: choose another, or set load_inplace to give it new weights",
            field="lora_name",
        )
    await state.llm.add_adapter(name, _allowed(body.lora_path, state.config))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter", **describe(None, 404, 503, body=UnloadAdapterRequest, also=PLAIN_TEXT)
)
async def unload_lora_adapter(request: Request) -> PlainTextResponse:
    """Forget an adapter; requests that use it end undisturbed."""
    state = state_of(request)
    body = decode_as(await read_body(request, state.config), UnloadAdapterRequest)
    if body.lora_name not in state.llm.adapter_paths:
        raise HttpError(
            404,
            f"adapter {body.lora_name[:100]!r} is not loaded",
            param="lora_name",
            code="adapter_not_found",
        )
    await state.llm.remove_adapter(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _allowed(path: str, config: ServerConfig) -> Path:
    """The real folder of a path. Raises HttpError 403 unless it lies below an allowed root."""
    try:
        found = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError(f"lora_path is no path: {error}", field="lora_path") from error
    if any(found.is_relative_to(root.resolve()) for root in config.adapter_roots):
        return found
    raise HttpError(
        403,
        f"lora_path {path[:200]!r} is not below a folder that adapters may come from: "
        "start the server with --adapter-root",
        kind="permission_error",
        param="lora_path",
    )
