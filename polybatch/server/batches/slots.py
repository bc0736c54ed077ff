"""How many rows of batches may be in the engine: what interactive requests leave.

Rows go to the engine in the lowest class: interactive requests are admitted before them, and take slots and
pages from them. What is left to bound is how long steps take: while interactive requests run, rows of batches
get half of the free slots; while one of them waits, no further row is sent. Among batches the one with the
nearest deadline goes first.

Where interactive requests leave too little, batches would miss their deadlines. Rows of those that fall
behind are promoted: one per few interactive requests, they take turns with these.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import insort
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import time

from polybatch.server.admission import Admission
from polybatch.server.batches.objects import Batch

LOOK_AHEAD = 4
"""One completion more than can run per so many, so that the engine never runs dry in between."""

BUSY_SHARE = 2
"""While interactive requests run: one row per so many free slots."""

PROMOTED_SHARE = 4
"""One promoted completion per so many interactive ones that run or wait, for they take turns."""

TICK_S = 0.02
"""How soon a change of interactive load is seen."""


class Capacity:
    """Hands out slots. max_seqs: completions that the engine runs at once."""

    def __init__(self, admission: Admission, max_seqs: int) -> None:
        self._admission, self._max_seqs = admission, max_seqs
        self._num_plain: Counter[str] = Counter()
        """By batch: rows that have a slot and are not promoted."""
        self._waiting: list[tuple[float, int, asyncio.Future[None], Batch]] = []
        self._order = itertools.count()
        self._alone = asyncio.Lock()
        self._num_suspects = 0
        self._ticker: asyncio.Task[None] | None = None
        self.num_in_flight = 0
        """Completions of batches in the engine, or about to be."""
        self.num_promoted = 0
        """Those of them that take their turns with interactive requests."""

    @property
    def limit(self) -> int:
        """Completions of batches that may be in flight now."""
        busy = self._admission
        if busy.num_queued_seqs or self._num_suspects:
            return 0
        free = max(0, self._max_seqs - busy.num_running_seqs)
        return free // BUSY_SHARE if busy.num_running_seqs else free + free // LOOK_AHEAD

    def promote(self, count: int, batch: Batch) -> bool:
        """Let so many completions of one row take their turns with interactive requests, until `demote`.

        False unless the batch is behind and there is room. A row of any size is promoted alone.
        """
        if not batch.is_behind(time()) or not self._may_promote(count):
            return False
        self.num_promoted += count
        self._num_plain[batch.id] -= 1
        return True

    def demote(self, count: int, batch: Batch) -> None:
        self.num_promoted -= count
        self._num_plain[batch.id] += 1

    def _may_promote(self, count: int) -> bool:
        # Promoted ones are among those that run or wait.
        busy = self._admission
        num_live = busy.num_running_seqs + busy.num_queued_seqs - self.num_promoted
        return not self.num_promoted or self.num_promoted + count <= num_live // PROMOTED_SHARE

    async def acquire(self, batch: Batch) -> None:
        """Wait for a slot; the nearest deadline goes first."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (batch.expires_s, next(self._order), future, batch)
        insort(self._waiting, entry)
        self._grant()
        if self._ticker is None and self._waiting:
            self._ticker = asyncio.create_task(self._tick())
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():
                self.give_back(batch)
            elif entry in self._waiting:
                self._waiting.remove(entry)
            raise

    def give_back(self, batch: Batch) -> None:
        """A row is over, or was never begun."""
        self._num_plain[batch.id] -= 1
        if not self._num_plain[batch.id]:
            del self._num_plain[batch.id]
        self.release()

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
            self._pop(0)
        # Who asks for a slot only to find that there is no further row shall not wait for one.
        while (done := self._first(Batch.is_answered)) is not None:
            self._pop(done)
        if self._waiting and not self._num_suspects and self._may_promote(1):
            behind = self._first(self._is_next)
            if behind is not None:
                self._pop(behind)

    def _is_next(self, batch: Batch) -> bool:
        """Whether a further row of a batch is wanted beside those that are promoted already."""
        return not self._num_plain[batch.id] and batch.is_behind(time())

    def _first(self, condition: Callable[[Batch], bool]) -> int | None:
        return next((i for i, (*_, batch) in enumerate(self._waiting) if condition(batch)), None)

    def _pop(self, index: int) -> None:
        _, _, future, batch = self._waiting.pop(index)
        # A cancelled one takes itself off the list, a moment later.
        if not future.cancelled():
            self.num_in_flight += 1
            self._num_plain[batch.id] += 1
            future.set_result(None)

    async def _tick(self) -> None:
        """Interactive requests come and go without saying so here."""
        while self._waiting:
            await asyncio.sleep(TICK_S)
            self._grant()
        self._ticker = None


class BatchSlots:
    """One batch's view of the capacity: `polybatch.jobs.rows.Slots`."""

    def __init__(self, capacity: Capacity, batch: Batch) -> None:
        self._capacity, self._batch = capacity, batch

    async def acquire(self) -> None:
        await self._capacity.acquire(self._batch)

    def release(self) -> None:
        self._capacity.give_back(self._batch)
