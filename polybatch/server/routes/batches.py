"""/v1/batches: files of requests, answered by a deadline with what interactive traffic leaves."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse

from polybatch.server.auth import caller_of
from polybatch.server.batches.objects import CreateBatch
from polybatch.server.batches.pages import check_query, listed, page_limit
from polybatch.server.bodies import decode_as, read_body
from polybatch.server.interface.answers import BatchList, BatchObject
from polybatch.server.openapi import describe, parameter
from polybatch.server.routes.files import AFTER, batches_of
from polybatch.server.state import state_of

router = APIRouter(tags=["batches"])

DEFAULT_LISTED, MAX_LISTED = 20, 100
PAGE = [parameter("limit", "How many.", {"type": "integer", "minimum": 1, "maximum": MAX_LISTED}), AFTER]


@router.post("/v1/batches", **describe(BatchObject, 404, 503, 507, body=CreateBatch))
async def create_batch(request: Request) -> JSONResponse:
    """Have the requests of an uploaded file answered."""
    service = batches_of(request)
    wanted = decode_as(await read_body(request, state_of(request).config), CreateBatch)
    return JSONResponse((await service.create(wanted, caller_of(request).tenant)).body())


@router.get("/v1/batches", **describe(BatchList, 400, 404, parameters=PAGE))
async def list_batches(request: Request) -> JSONResponse:
    """The caller's batches, newest first."""
    service, query = batches_of(request), request.query_params
    check_query(query, PAGE)
    limit = page_limit(query, DEFAULT_LISTED, MAX_LISTED)
    tenant = caller_of(request).tenant
    batches = await asyncio.to_thread(service.batches, tenant, query.get("after"), limit + 1)
    return JSONResponse(listed([batch.body() for batch in batches], limit))


@router.get("/v1/batches/{batch_id}", **describe(BatchObject, 404))
async def get_batch(request: Request, batch_id: str) -> JSONResponse:
    """One batch by its id."""
    return JSONResponse(batches_of(request).batch(batch_id, caller_of(request).tenant).body())


@router.post("/v1/batches/{batch_id}/cancel", **describe(BatchObject, 404, 409))
async def cancel_batch(request: Request, batch_id: str) -> JSONResponse:
    """Answer no further row; what was answered is kept."""
    return JSONResponse((await batches_of(request).cancel(batch_id, caller_of(request).tenant)).body())
