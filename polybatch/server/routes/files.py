"""/v1/files: what batches read and write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from polybatch.errors import RequestError
from polybatch.server.auth import caller_of
from polybatch.server.batches.pages import listed, page_limit, query_parameters
from polybatch.server.batches.service import BatchService
from polybatch.server.errors import HttpError
from polybatch.server.state import state_of
from polybatch.server.streams import EventStream

router = APIRouter(tags=["batches"])

MAX_LISTED = 10_000
CHUNK_BYTES = 256 << 10

_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string"},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


class Content(EventStream):
    """The bytes of a file."""

    media_type = "application/octet-stream"


def batches_of(request: Request) -> BatchService:
    """Raises HttpError 404 where the server keeps no files."""
    service = state_of(request).batches
    if service is None:
        raise HttpError(
            404, "this server keeps no files and batches: start it with --data-dir", code="batches_disabled"
        )
    return service


@router.post("/v1/files", openapi_extra=_FORM)
async def upload_file(request: Request) -> JSONResponse:
    """Upload a file of requests, one JSON object per line."""
    service = batches_of(request)
    return JSONResponse((await service.upload(request, caller_of(request).tenant)).body())


@router.get("/v1/files", openapi_extra=query_parameters("purpose", "limit", "order", "after"))
async def list_files(request: Request) -> JSONResponse:
    """The caller's files, newest first."""
    service, query = batches_of(request), request.query_params
    limit, order = page_limit(query, MAX_LISTED, MAX_LISTED), query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError(f"order is {order[:80]!r}; it must be 'asc' or 'desc'", field="order")
    files = await asyncio.to_thread(
        service.store.files,
        caller_of(request).tenant,
        time.time(),
        purpose=query.get("purpose"),
        after=query.get("after"),
        limit=limit + 1,
        is_newest_first=order == "desc",
    )
    return JSONResponse(listed([file.body() for file in files], limit))


@router.get("/v1/files/{file_id}")
async def get_file(request: Request, file_id: str) -> JSONResponse:
    """One file by its id."""
    return JSONResponse(batches_of(request).file(file_id, caller_of(request).tenant).body())


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> JSONResponse:
    """Forget a file. Batches that read it are not affected."""
    service = batches_of(request)
    file = service.file(file_id, caller_of(request).tenant)
    await asyncio.to_thread(service.store.delete_file, file.id)
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content")
async def get_content(request: Request, file_id: str) -> Response:
    """A file's bytes, streamed."""
    service = batches_of(request)
    file = service.file(file_id, caller_of(request).tenant)
    try:
        content = _open(service.store.path_of(file.id))
    except FileNotFoundError:
        raise HttpError(404, f"there is no file {file.id!r} any more", code="not_found") from None
    timeout_s = state_of(request).config.send_timeout_s
    answer = Content(_read(content), content.close, timeout_s)
    answer.headers["content-length"] = str(file.size)
    return answer


def _open(path: Path) -> BinaryIO:
    return open(path, "rb")


async def _read(content: BinaryIO) -> AsyncGenerator[bytes, None]:
    while data := await asyncio.to_thread(content.read, CHUNK_BYTES):
        yield data
