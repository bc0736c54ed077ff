"""/v1/batches: files of requests, answered by a deadline with what interactive traffic leaves."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from polybatch.server.auth import caller_of
from polybatch.server.batches.objects import CreateBatch
from polybatch.server.batches.pages import listed, page_limit, query_parameters
from polybatch.server.bodies import decode_as, read_body
from polybatch.server.openapi import struct_body
from polybatch.server.routes.files import batches_of
from polybatch.server.state import state_of

router = APIRouter(tags=["batches"])

DEFAULT_LISTED, MAX_LISTED = 20, 100


@router.post("/v1/batches", openapi_extra=struct_body(CreateBatch))
async def create_batch(request: Request) -> JSONResponse:
    """Have the requests of an uploaded file answered."""
    service = batches_of(request)
    wanted = decode_as(await read_body(request, state_of(request).config), CreateBatch)
    return JSONResponse((await service.create(wanted, caller_of(request).tenant)).body())


@router.get("/v1/batches", openapi_extra=query_parameters("limit", "after"))
async def list_batches(request: Request) -> JSONResponse:
    """The caller's batches, newest first."""
    service, query = batches_of(request), request.query_params
    limit = page_limit(query, DEFAULT_LISTED, MAX_LISTED)
    tenant = caller_of(request).tenant
    batches = await asyncio.to_thread(service.batches, tenant, query.get("after"), limit + 1)
    return JSONResponse(listed([batch.body() for batch in batches], limit))


@router.get("/v1/batches/{batch_id}")
async def get_batch(request: Request, batch_id: str) -> JSONResponse:
    """One batch by its id."""
    return JSONResponse(batches_of(request).batch(batch_id, caller_of(request).tenant).body())


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel_batch(request: Request, batch_id: str) -> JSONResponse:
    """Answer no further row; what was answered is kept."""
    return JSONResponse((await batches_of(request).cancel(batch_id, caller_of(request).tenant)).body())
