"""Runs a job's rows through an asynchronous answerer: a server's engine, or a server over HTTP.

    pending lines -> slot -> answer -> output -> journal

A line is read when a slot is free, so memory depends on the slots. Files are touched in one thread of their
own, which never holds up the event loop. `polybatch.jobs.runner` does the same around an engine's steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from polybatch.jobs.job import Job
from polybatch.jobs.lines import Line
from polybatch.jobs.results import Progress, ResultWriter

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a row ended. body: a response, or an error object. model: as the row asked.

    summary: {"code", "message"} of an error, None beside a response.
    """

    status: int
    body: dict[str, Any]
    model: str = ""
    summary: dict[str, Any] | None = None


class Slots(Protocol):
    """How many rows may be under way; `asyncio.Semaphore` is one."""

    async def acquire(self) -> object:
        """Wait for a slot."""
        ...

    def release(self) -> None: ...


class Io:
    """Calls functions one after the other in the one thread that owns a job's files."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def __call__(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


class RowRunner:
    """One run over the rows of a job that lack a result. Made in the thread of `io`, run in the event loop.

    answer: ends every row one way or another; what it raises ends the run, with its rows still to do.
    report: called in that thread with the progress, after every row.
    """

    def __init__(
        self,
        job: Job,
        answer: Callable[[Line], Awaitable[Answer]],
        slots: Slots,
        io: Io,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self._job, self._answer, self._slots, self._io = job, answer, slots, io
        self._results = ResultWriter(job)
        self._report = report
        self.progress = self._results.progress

    async def run(self) -> None:
        """Work until every row has a result or an error line.

        What finished is synced on every way out, also when cancelled.
        """
        lines = self._job.pending_lines()
        try:
            async with asyncio.TaskGroup() as rows:
                while True:
                    await self._slots.acquire()
                    try:
                        line = await self._io(next, lines, None)
                    except BaseException:
                        self._slots.release()
                        raise
                    if line is None:
                        self._slots.release()
                        break
                    # Not in the task, which is never begun if it is cancelled first.
                    rows.create_task(self._one(line)).add_done_callback(lambda _: self._slots.release())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            await self._io(self._results.flush, True)

    async def _one(self, line: Line) -> None:
        await self._io(self._write, line, await self._answer(line))

    def _write(self, line: Line, answer: Answer) -> None:
        if answer.summary is None:
            self._results.succeed(line, answer.body, answer.model)
        else:
            self._results.fail_as(line, answer.status, answer.body, answer.summary)
        self._results.flush()
        self._report(self.progress)


def failure(line: Line, status: int, body: dict[str, Any], code: str) -> Answer:
    """An error line from an error object. code: where the object has none."""
    error = body.get("error")
    found = error if isinstance(error, dict) else {}
    message = f"line {line.number}: {found.get('message') or 'no reason was given'}"
    return Answer(status, body, summary={"code": found.get("code") or code, "message": message})
