"""Files and batches of all tenants: what the routes call, and the batches that run meanwhile.

Every tenant sees what it made itself and nothing else; ids of others are like ids that do not exist.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path

from fastapi import Request

from polybatch.errors import PolybatchError, RequestError
from polybatch.jobs.schema import Endpoint
from polybatch.server.batches.objects import (
    DEFAULT_EXPIRY_S,
    Batch,
    BatchStatus,
    CreateBatch,
    ExpiresAfter,
    StoredFile,
    check_metadata,
    window_s,
)
from polybatch.server.batches.process import BatchProcess
from polybatch.server.batches.slots import Capacity
from polybatch.server.batches.store import Store
from polybatch.server.batches.upload import Upload, receive
from polybatch.server.errors import HttpError, unavailable
from polybatch.server.state import DEFAULT_MAX_NUM_SEQS, ServerState

logger = logging.getLogger("polybatch.server")

PURPOSE = "batch"
MAX_FILES = 10_000
SWEEP_S = 60.0
RETRY_S = 10.0
"""Before a batch is taken up again that this machine could not go on with, for example for a full disk."""


class BatchService:
    """Opened with the server's state, started with its event loop; `stop` ends what runs, for later.

    Raises ConfigError if the data folder cannot be used.
    """

    def __init__(self, state: ServerState, data_dir: Path) -> None:
        self._state, self.store = state, Store(data_dir)
        max_seqs = state.llm.settings.get("max_num_seqs") or DEFAULT_MAX_NUM_SEQS
        assert isinstance(max_seqs, int)
        self.capacity = Capacity(state.admission, max_seqs)
        self._processes: dict[str, BatchProcess] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._uploading: dict[str, int] = {}

    def start(self) -> None:
        """Take up all batches that are not over."""
        for batch in self.store.unfinished_batches():
            self._begin(batch)
        if self._processes:
            logger.info("%d batches go on", len(self._processes))
        self._spawn(self._sweep())

    async def stop(self) -> None:
        """Stop working; what is not done yet goes on with the next `start` on the same folder."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._processes.clear()

    async def close(self) -> None:
        await self.stop()
        self.store.close()

    async def upload(self, request: Request, tenant: str) -> StoredFile:
        """Receive a file. Raises RequestError or HttpError."""
        config = self._state.config
        if self._state.is_draining:
            raise unavailable("the server is shutting down", "shutting_down")
        count, used = await asyncio.to_thread(self.store.usage, tenant)
        # What is on its way counts as well, or many uploads at once would exceed any quota.
        room = config.max_tenant_file_bytes - used - self._uploading.get(tenant, 0)
        if count >= MAX_FILES or room <= 0:
            raise HttpError(
                413, f"{count:,} files of {used:,} bytes are kept, the limits are {MAX_FILES:,} and "
                f"{config.max_tenant_file_bytes:,}: delete some", code="quota_exceeded",
                headers={"Connection": "close"},
            )  # fmt: skip
        limit = min(config.max_file_bytes, room)
        path = self.store.upload_path()
        self._uploading[tenant] = self._uploading.get(tenant, 0) + limit
        try:
            upload = await receive(request, path, limit, config.body_timeout_s)
            file = _described(upload, tenant)
            await asyncio.to_thread(self.store.add_file, file, path)
        finally:
            path.unlink(missing_ok=True)
            self._uploading[tenant] -= limit
            if not self._uploading[tenant]:
                del self._uploading[tenant]
        return file

    def file(self, file_id: str, tenant: str) -> StoredFile:
        """Raises HttpError 404."""
        found = self.store.file(file_id, tenant, time.time())
        if found is None:
            raise HttpError(404, f"there is no file {file_id[:80]!r}", param="file_id", code="not_found")
        return found

    def batch(self, batch_id: str, tenant: str) -> Batch:
        """Raises HttpError 404."""
        running = self._processes.get(batch_id)
        if running is not None and running.batch.tenant == tenant:
            return running.batch
        found = self.store.batch(batch_id, tenant)
        if found is None:
            raise HttpError(404, f"there is no batch {batch_id[:80]!r}", param="batch_id", code="not_found")
        return found

    def batches(self, tenant: str, after: str | None, limit: int) -> list[Batch]:
        """Newest first."""
        found = self.store.batches(tenant, after=after, limit=limit)
        running = (self._processes.get(batch.id) for batch in found)
        return [batch if live is None else live.batch for batch, live in zip(found, running, strict=True)]

    async def create(self, wanted: CreateBatch, tenant: str) -> Batch:
        """Begin a batch. Raises RequestError or HttpError."""
        if self._state.is_draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if wanted.endpoint not in set(Endpoint):
            known = " or ".join(Endpoint)
            raise RequestError(f"endpoint is {wanted.endpoint[:80]!r}; it must be {known}", field="endpoint")
        check_metadata(wanted.metadata)
        seconds = window_s(wanted.completion_window)
        keep = wanted.output_expires_after
        file = self.file(wanted.input_file_id, tenant)
        if file.purpose != PURPOSE:
            raise RequestError(
                f"{file.id} has the purpose {file.purpose!r}, not 'batch'", field="input_file_id"
            )
        self._check_room(tenant)
        now_s = int(time.time())
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}", tenant=tenant, input_file_id=file.id, endpoint=wanted.endpoint,
            completion_window=wanted.completion_window, created_s=now_s, expires_s=now_s + seconds,
            output_expiry_s=keep.checked_s("output_expires_after") if keep else DEFAULT_EXPIRY_S,
            metadata=wanted.metadata,
        )  # fmt: skip
        try:
            await asyncio.to_thread(self.store.add_batch, batch)
        except FileNotFoundError:
            # It was deleted just now.
            raise HttpError(404, f"there is no file {file.id!r}", code="not_found") from None
        self._begin(batch)
        return batch

    def _check_room(self, tenant: str) -> None:
        config = self._state.config
        batches = [process.batch for process in self._processes.values()]
        count = sum(batch.tenant == tenant and not batch.status.is_over for batch in batches)
        if count >= config.max_tenant_batches:
            raise HttpError(
                429, f"{count} batches are under way, the limit is {config.max_tenant_batches}: wait for one",
                kind="rate_limit_error", code="too_many_batches", headers={"Retry-After": "60"},
            )  # fmt: skip
        used = self.store.usage(tenant)[1]
        if used >= config.max_tenant_file_bytes:
            raise HttpError(
                413, f"{used:,} bytes of files are kept, the limit is {config.max_tenant_file_bytes:,}: "
                "delete some, so that there is room for results", code="quota_exceeded",
            )  # fmt: skip

    async def cancel(self, batch_id: str, tenant: str) -> Batch:
        """Raises HttpError 404, or 409 if it is over already."""
        batch = self.batch(batch_id, tenant)
        if batch.status.is_over or batch.status is BatchStatus.FINALIZING:
            raise HttpError(409, f"batch {batch.id} is {batch.status.value}; it cannot be cancelled any more")
        await self._processes[batch.id].cancel()
        return batch

    def _begin(self, batch: Batch) -> None:
        process = self._processes[batch.id] = BatchProcess(self._state, self.store, self.capacity, batch)
        self._spawn(self._run(process))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, process: BatchProcess) -> None:
        """See a batch to its end, whatever happens on the way."""
        batch = process.batch
        while not batch.status.is_over:
            try:
                await process.run()
            except (PolybatchError, OSError, sqlite3.Error) as error:
                logger.error("%s cannot go on now: %s", batch.id, error)
                await asyncio.sleep(RETRY_S)
        counts = batch.counts
        logger.info(
            "%s is %s: %d of %d rows answered, %d errors", batch.id, batch.status.value, counts.completed,
            counts.total, counts.failed,
        )  # fmt: skip
        del self._processes[batch.id]

    async def _sweep(self) -> None:
        """Delete files whose time is over."""
        while True:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.store.delete_expired, time.time())
            await asyncio.sleep(SWEEP_S)


def _described(upload: Upload, tenant: str) -> StoredFile:
    """The record of an upload. Raises RequestError for fields that make no sense."""
    fields = upload.fields
    purpose = fields.pop("purpose", None)
    if purpose != PURPOSE:
        raise RequestError(f"purpose is {purpose!r}; only 'batch' is supported", field="purpose")
    anchor = fields.pop("expires_after[anchor]", "created_at")
    seconds = fields.pop("expires_after[seconds]", str(DEFAULT_EXPIRY_S))
    for name in fields:
        raise RequestError(f"unknown field {name[:80]!r}: remove it", field=name[:80])
    if not (seconds.isascii() and seconds.isdigit() and len(seconds) < 10):
        raise RequestError(
            f"expires_after[seconds] is {seconds[:80]!r}; it must be a number", field="expires_after[seconds]"
        )
    if not upload.size:
        raise RequestError("the file is empty", field="file")
    now_s = int(time.time())
    expires_s = now_s + ExpiresAfter(int(seconds), anchor).checked_s("expires_after")
    return StoredFile(
        id=f"file-{uuid.uuid4().hex}", tenant=tenant, filename=upload.filename or "", purpose=PURPOSE,
        size=upload.size, created_s=now_s, expires_s=expires_s,
    )  # fmt: skip
