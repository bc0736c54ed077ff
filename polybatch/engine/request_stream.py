"""What comes of one request in flight, as `AsyncLLM` hands it out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from polybatch.engine.deltas import OutputCollector
from polybatch.engine.messages import RequestDelta
from polybatch.errors import PolybatchError
from polybatch.request import Request, RequestOutput


class RequestStream:
    """Deltas of one request in flight; iterate once, and `close` it if you stop early.

    Raises, at the end of what came, RequestError if the engine refused the request, EngineError if it failed.
    """

    def __init__(self, request: Request, close: Callable[[], None]) -> None:
        self.request = request
        self._close = close
        self._queue: asyncio.Queue[RequestDelta | PolybatchError] = asyncio.Queue()
        self._is_over = False

    def __aiter__(self) -> AsyncIterator[RequestDelta]:
        return self

    async def __anext__(self) -> RequestDelta:
        if self._is_over:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, PolybatchError):
            self._is_over = True
            raise item
        self._is_over = item.is_finished
        return item

    def put(self, item: RequestDelta | PolybatchError) -> None:
        """Called by `AsyncLLM`."""
        self._queue.put_nowait(item)

    def close(self) -> None:
        """Abort the request if it still runs; its pages are free at the engine's next step."""
        self._close()

    async def collect(self, prompt: str | None = None) -> RequestOutput:
        """Wait for the end and return all of it. prompt: its text, for the output."""
        collector = OutputCollector(self.request, prompt)
        try:
            async for delta in self:
                collector.add(delta)
        finally:
            self.close()
        return collector.output()
