"""How many rows of batches may be in the engine: what interactive requests leave.

Rows go to the engine in the lowest class: interactive requests are admitted before them, and take slots and
pages from them. What is left to bound is how long steps take: while interactive requests run, rows of batches
get half of the free slots; while one of them waits, no further row is sent. Among batches the one with the
nearest deadline goes first.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from polybatch.server.admission import Admission

LOOK_AHEAD = 4
"""One completion more than can run per so many, so that the engine never runs dry in between."""

BUSY_SHARE = 2
"""While interactive requests run: one row per so many free slots."""

TICK_S = 0.02
"""How soon a change of interactive load is seen."""


class Capacity:
    """Hands out slots. max_seqs: completions that the engine runs at once."""

    def __init__(self, admission: Admission, max_seqs: int) -> None:
        self._admission, self._max_seqs = admission, max_seqs
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._alone = asyncio.Lock()
        self._num_suspects = 0
        self._ticker: asyncio.Task[None] | None = None
        self.num_in_flight = 0
        """Completions of batches in the engine, or about to be."""

    @property
    def limit(self) -> int:
        """Completions of batches that may be in flight now."""
        busy = self._admission
        if busy.num_queued_seqs or self._num_suspects:
            return 0
        free = max(0, self._max_seqs - busy.num_running_seqs)
        return free // BUSY_SHARE if busy.num_running_seqs else free + free // LOOK_AHEAD

    async def acquire(self, deadline_s: float) -> None:
        """Wait for a slot; the nearest deadline goes first."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (deadline_s, next(self._order), future))
        self._grant()
        if self._ticker is None and self._waiting:
            self._ticker = asyncio.create_task(self._tick())
        try:
            await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release()
            raise

    def release(self, count: int = 1) -> None:
        self.num_in_flight -= count
        self._grant()

    def add(self, count: int) -> None:
        """A row turned out to have so many completions more; it may exceed the limit, others wait for it."""
        self.num_in_flight += count

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Let a row that was there when the engine failed run with no other row of any batch."""
        self._num_suspects += 1
        try:
            async with self._alone:
                yield
        finally:
            self._num_suspects -= 1
            self._grant()

    def _grant(self) -> None:
        while self._waiting and self.num_in_flight < self.limit:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                self.num_in_flight += 1
                future.set_result(None)

    async def _tick(self) -> None:
        """Interactive requests come and go without saying so here."""
        while self._waiting:
            await asyncio.sleep(TICK_S)
            self._grant()
        self._ticker = None


class BatchSlots:
    """One batch's view of the capacity: `polybatch.jobs.rows.Slots`."""

    def __init__(self, capacity: Capacity, deadline_s: float) -> None:
        self._capacity, self._deadline_s = capacity, deadline_s

    async def acquire(self) -> None:
        await self._capacity.acquire(self._deadline_s)

    def release(self) -> None:
        self._capacity.release()
