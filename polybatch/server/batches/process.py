"""Carries one batch from wherever it stands to its end.

    validating   index the input, refuse duplicates
    in_progress  rows to answers, journaled as any job (polybatch.jobs)
    finalizing   answers split into output and error file

Every stage may be cut off at any moment and begun again: what was answered is in the job's output, the files
that it is split into have the same names every time, and the last write makes the batch's end known in one
transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec import structs

from polybatch.errors import ConfigError
from polybatch.jobs.job import Job, open_job
from polybatch.jobs.lines import decode_output
from polybatch.jobs.results import Progress, ResultWriter
from polybatch.jobs.rows import Io, RowRunner
from polybatch.server.batches.answer import RowAnswerer, expired
from polybatch.server.batches.objects import Batch, BatchStatus, RequestCounts, StoredFile
from polybatch.server.batches.slots import BatchSlots, Capacity
from polybatch.server.batches.store import Store
from polybatch.server.state import ServerState

FLUSH_ROWS = 1_000


class BatchProcess:
    """A batch under way. `run` it; `cancel` may come at any time."""

    def __init__(self, state: ServerState, store: Store, capacity: Capacity, batch: Batch) -> None:
        self._state, self._store, self._capacity, self.batch = state, store, capacity, batch
        self._folder = store.work / batch.id
        self._rows: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Work until the batch is over. Raises PolybatchError, OSError or sqlite3.Error if it cannot."""
        with ThreadPoolExecutor(1, thread_name_prefix=self.batch.id) as pool:
            io = Io(pool)
            opening = asyncio.create_task(io(self._open))
            try:
                job = await asyncio.shield(opening)
            except asyncio.CancelledError:
                await asyncio.wait((opening,))
                if opening.exception() is None:
                    opening.result().close()
                raise
            except ConfigError as error:
                if self.batch.status not in (BatchStatus.VALIDATING, BatchStatus.CANCELLING):
                    raise
                self.batch.errors = [
                    {"code": "invalid_file", "message": str(error), "line": None, "param": "input_file_id"}
                ]
                await self._enter(BatchStatus.FAILED)
                await asyncio.to_thread(self._store.remove_work, self.batch)
                return
            try:
                await self._answer_rows(job, io)
                await self._finalize(job, io)
            finally:
                await io(job.close)
        await asyncio.to_thread(self._store.remove_work, self.batch)

    async def cancel(self) -> None:
        """Answer no further row. Does nothing unless rows may still be answered."""
        if self.batch.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS):
            await self._enter(BatchStatus.CANCELLING)
            if self._rows is not None:
                self._rows.cancel()

    def _open(self) -> Job:
        source = self._folder / "input.jsonl"
        job = open_job(source, self._folder / "rows.jsonl", {"batch": self.batch.id}, is_served=True)
        if not job.journal.counts()[0]:
            job.close()
            raise ConfigError("the file has no requests: give one JSON object per line")
        return job

    async def _enter(self, status: BatchStatus) -> None:
        self.batch.status = status
        self.batch.at[status] = int(time.time())
        await asyncio.to_thread(self._store.update_batch, self.batch)

    async def _answer_rows(self, job: Job, io: Io) -> None:
        """Answer rows until there are none, the deadline passes or somebody cancels; decide the outcome."""
        batch = self.batch
        answerer = RowAnswerer(self._state, batch, self._capacity)
        slots = BatchSlots(self._capacity, batch)
        runner = await io(RowRunner, job, answerer, slots, io, self._count)
        self._count(runner.progress)
        if batch.status is BatchStatus.VALIDATING:
            await self._enter(BatchStatus.IN_PROGRESS)
        outcome = BatchStatus.CANCELLED if batch.status is BatchStatus.CANCELLING else batch.outcome
        if outcome is None:
            self._rows = asyncio.create_task(runner.run())
            try:
                await asyncio.wait((self._rows,), timeout=max(0.0, batch.expires_s - time.time()))
                is_late = not self._rows.done()
            finally:
                self._rows.cancel()
                await asyncio.wait((self._rows,))
            if not self._rows.cancelled():
                self._rows.result()
            outcome = BatchStatus.COMPLETED
            if batch.status is BatchStatus.CANCELLING:
                outcome = BatchStatus.CANCELLED
            elif is_late and runner.progress.done < runner.progress.total:
                outcome = BatchStatus.EXPIRED
        batch.outcome = outcome
        if outcome is not BatchStatus.CANCELLED:
            await self._enter(BatchStatus.FINALIZING)

    def _count(self, progress: Progress) -> None:
        self.batch.counts = RequestCounts(progress.total, progress.ok, progress.errors)

    async def _finalize(self, job: Job, io: Io) -> None:
        batch = self.batch
        assert batch.outcome is not None
        if batch.outcome is BatchStatus.EXPIRED:
            self._count(await io(_expire, job))
        made = await io(self._split, job)
        output_file_id, error_file_id = (file.id if file else None for file in made)
        over = structs.replace(
            batch, status=batch.outcome, at=batch.at | {batch.outcome: int(time.time())},
            output_file_id=output_file_id, error_file_id=error_file_id,
        )  # fmt: skip
        await asyncio.to_thread(self._store.update_batch, over, [file for file in made if file])
        # Clients look at this one, and ask for the files as soon as it names them.
        batch.output_file_id, batch.error_file_id, batch.at = output_file_id, error_file_id, over.at
        batch.status = over.status

    def _split(self, job: Job) -> tuple[StoredFile | None, StoredFile | None]:
        """Output and error file, None where there is nothing to say."""
        names = ("output", "error")
        paths = [self._folder / name for name in names]
        with open(job.output.path, "rb") as rows, open(paths[0], "wb") as good, open(paths[1], "wb") as bad:
            for data in rows:
                record = decode_output(data)
                (bad if record is None or record.is_error else good).write(data)
        return self._keep(names[0], paths[0]), self._keep(names[1], paths[1])

    def _keep(self, name: str, content: Path) -> StoredFile | None:
        size = content.stat().st_size
        if not size:
            return None
        batch, now_s = self.batch, int(time.time())
        # The same whenever it is made again.
        file_id = "file-" + hashlib.sha256(f"{batch.id}/{name}".encode()).hexdigest()[:24]
        file = StoredFile(
            id=file_id, tenant=batch.tenant, filename=f"{batch.id}_{name}.jsonl", purpose="batch_output",
            size=size, created_s=now_s, expires_s=now_s + batch.output_expiry_s,
        )  # fmt: skip
        self._store.place(file_id, content)
        return file


def _expire(job: Job) -> Progress:
    """Give every row that is left its error line."""
    results = ResultWriter(job)
    for line in job.pending_lines():
        answer = expired(line)
        assert answer.summary is not None
        results.fail_as(line, answer.status, answer.body, answer.summary)
        if results.num_unwritten >= FLUSH_ROWS:
            results.flush()
    results.flush(sync=True)
    return results.progress
