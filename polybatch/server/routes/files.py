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
from polybatch.server.batches.objects import MAX_EXPIRY_S, MIN_EXPIRY_S
from polybatch.server.batches.pages import check_query, listed, page_limit
from polybatch.server.batches.service import BatchService
from polybatch.server.errors import HttpError
from polybatch.server.interface.answers import DeletedFile, File, FileList
from polybatch.server.openapi import describe, parameter
from polybatch.server.state import state_of
from polybatch.server.streams import EventStream

router = APIRouter(tags=["batches"])

MAX_LISTED = 10_000
CHUNK_BYTES = 256 << 10

FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "JSON Lines."},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": MIN_EXPIRY_S, "maximum": MAX_EXPIRY_S},
    },
}
AFTER = parameter("after", "The id that the page before ended with.", {"type": "string"})
PAGE = [
    parameter("purpose", "Of the files.", {"type": "string"}),
    parameter("limit", "How many.", {"type": "integer", "minimum": 1, "maximum": MAX_LISTED}),
    parameter("order", "By creation.", {"type": "string", "enum": ["asc", "desc"], "default": "desc"}),
    AFTER,
]
BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


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


@router.post("/v1/files", **describe(File, 404, 503, 507, form=FORM))
async def upload_file(request: Request) -> JSONResponse:
    """Upload a file of requests, one JSON object per line."""
    service = batches_of(request)
    return JSONResponse((await service.upload(request, caller_of(request).tenant)).body())


@router.get("/v1/files", **describe(FileList, 400, 404, parameters=PAGE))
async def list_files(request: Request) -> JSONResponse:
    """The caller's files, newest first."""
    service, query = batches_of(request), request.query_params
    check_query(query, PAGE)
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


@router.get("/v1/files/{file_id}", **describe(File, 404))
async def get_file(request: Request, file_id: str) -> JSONResponse:
    """One file by its id."""
    return JSONResponse(batches_of(request).file(file_id, caller_of(request).tenant).body())


@router.delete("/v1/files/{file_id}", **describe(DeletedFile, 404))
async def delete_file(request: Request, file_id: str) -> JSONResponse:
    """Forget a file. Batches that read it are not affected."""
    service = batches_of(request)
    file = service.file(file_id, caller_of(request).tenant)
    await asyncio.to_thread(service.store.delete_file, file.id)
    return JSONResponse({"id": file.id, "object": "file", "deleted": True})


@router.get("/v1/files/{file_id}/content", **describe(None, 404, also=BYTES))
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
