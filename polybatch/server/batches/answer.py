"""One row of a batch: checked and answered as the same body of a live client would be.

A row is let through when it has a slot, in the lowest class, and once more with live requests where its batch
falls behind meanwhile. Where the engine fails or is down, the row is
tried again; one that was there several times is tried alone, and given up when it fails alone again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from polybatch.errors import EngineError, PolybatchError, RequestError
from polybatch.jobs.lines import Line, parse_envelope
from polybatch.jobs.responses import error_body
from polybatch.jobs.rows import Answer, failure
from polybatch.jobs.schema import refuse_live_fields
from polybatch.request import RequestOutput
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.server.auth import Caller
from polybatch.server.batches.objects import Batch
from polybatch.server.batches.slots import Capacity
from polybatch.server.call import ServerCall, parse_server_call
from polybatch.server.errors import HttpError, as_http
from polybatch.server.generation import Generation, prepare
from polybatch.server.routes.completions import whole_answer
from polybatch.server.state import ServerState

TRIES_TOGETHER, TRIES_ALONE = 2, 2
"""How often the engine may fail while a row is in it, with other rows of batches beside it and without."""

BUSY_STATUSES = (429, 503)
LOOK_S = 1.0
"""How often a row in the engine looks whether its batch has fallen behind."""

MAX_WAIT_S = 10.0


class RowAnswerer:
    """Answers the rows of one batch."""

    def __init__(self, state: ServerState, batch: Batch, capacity: Capacity) -> None:
        self._state, self._batch, self._capacity = state, batch, capacity
        self._caller = Caller(batch.tenant)

    async def __call__(self, line: Line) -> Answer:
        num_failures = 0
        while True:
            is_alone = num_failures >= TRIES_TOGETHER
            try:
                async with self._capacity.alone() if is_alone else nullcontext():
                    return await self._try(line)
            except HttpError as error:
                if error.status not in BUSY_STATUSES:
                    return _failed(line, error)
                await asyncio.sleep(_wait_s(error))
            except EngineError as error:
                num_failures += 1
                if num_failures >= TRIES_TOGETHER + TRIES_ALONE:
                    return _failed(line, error)
                await self._state.llm.wait_ready()
            except PolybatchError as error:
                return _failed(line, error)

    async def _try(self, line: Line) -> Answer:
        await self._state.llm.wait_ready()
        call = self._parse(line)
        count = call.call.num_sequences
        self._capacity.add(count - 1)
        try:
            generation, outputs = await self._generate(await prepare(self._state, call, self._caller), count)
        finally:
            self._capacity.release(count - 1)
        identity = {
            "response_id": f"{self._batch.id}-{line.number}",
            "created": int(time.time()),
            "fingerprint": self._state.fingerprint,
        }
        return Answer(200, whole_answer(self._state, generation, outputs, identity), call.call.model)

    async def _generate(self, generation: Generation, count: int) -> tuple[Generation, list[RequestOutput]]:
        """Run a row in the lowest class, until it is promoted; returns what ended."""
        promoted = self._promoted(generation, count)
        if promoted is None:
            generation.submit(is_queued=False)
            collecting = asyncio.create_task(generation.collect())
            try:
                while promoted is None and not collecting.done():
                    await asyncio.wait((collecting,), timeout=LOOK_S)
                    promoted = None if collecting.done() else self._promoted(generation, count)
                if promoted is None:
                    return generation, collecting.result()
            finally:
                collecting.cancel()
                generation.close()
        try:
            promoted.submit(is_queued=False)
            return promoted, await promoted.collect()
        finally:
            promoted.close()
            self._capacity.demote(count, self._batch)

    def _promoted(self, generation: Generation, count: int) -> Generation | None:
        """A row among the live requests of its tenant; None unless its batch is behind and there is room."""
        if not self._capacity.promote(count, self._batch):
            return None
        promoted = generation.promoted()
        try:
            promoted.enter()
        except (HttpError, RequestError):
            # The tenant, or the server, has as much as it may: it goes on in the lowest class.
            self._capacity.demote(count, self._batch)
            return None
        return promoted

    def _parse(self, line: Line) -> ServerCall:
        """Check a line. Raises RequestError or HttpError."""
        limit = self._state.config.max_body_bytes
        if line.data is None or len(line.data) > limit:
            raise HttpError(413, f"the line is longer than {limit:,} bytes: split the request")
        endpoint, body = parse_envelope(line)
        if endpoint.value != self._batch.endpoint:
            raise RequestError(
                f"url is {endpoint.value}; this batch is for {self._batch.endpoint}", field="url"
            )
        if not isinstance(body, dict):
            raise RequestError("body must be an object", field="body")
        refuse_live_fields(body)
        policy = str(self._state.llm.settings.get("policy") or "fcfs")
        call = parse_server_call(endpoint, self._seeded(line, body), self._state.config, policy)
        if call.is_streamed:
            raise RequestError(
                "stream is true; rows of a batch are answered whole: remove it", field="stream"
            )
        return replace(call, priority=BATCH_PRIORITY)

    def _seeded(self, line: Line, body: dict[str, Any]) -> dict[str, Any]:
        """A row without a seed gets one from the batch and its line, so that a restart changes no answer."""
        if body.get("seed") is not None:
            return body
        key = f"{self._batch.id}:{line.number}".encode()
        return body | {"seed": int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())}


def expired(line: Line) -> Answer:
    """What becomes of a row that had no turn before its batch's deadline."""
    message = "the completion window ended before this request was run"
    return failure(
        line, 408, error_body(message, kind="timeout_error", code="batch_expired"), "batch_expired"
    )


def _failed(line: Line, error: PolybatchError) -> Answer:
    found = as_http(error)
    return failure(
        line, found.status, found.body, "engine_error" if found.status >= 500 else "invalid_request"
    )


def _wait_s(error: HttpError) -> float:
    """Seconds until a refused row is tried again."""
    told = error.headers.get("Retry-After", "1")
    return min(float(told), MAX_WAIT_S) if told.isdigit() else 1.0
