"""The engine as watchers see it: one snapshot for all of them, seldom enough to cost next to nothing."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from polybatch.engine.async_llm import AsyncLLM, EngineState
from polybatch.engine.snapshot import EngineSnapshot
from polybatch.engine.step_log import MAX_STEPS, StepRecord
from polybatch.errors import EngineError

MIN_INTERVAL_S = 0.25
MAX_SHARE = 0.005
"""Of the engine's time that snapshots may take."""

PATIENCE_S = 1.0
"""For an engine in a long step; then the last snapshot has to do."""


class EngineView:
    """Snapshots on demand.

    steps: the last of them, oldest first, over several snapshots. life: which engine process they are of,
    counted from 0.
    """

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._snapshot: EngineSnapshot | None = None
        self._taken_s = float("-inf")
        self._taking: asyncio.Task[None] | None = None
        self.life = llm.num_restarts
        self.steps: deque[StepRecord] = deque(maxlen=MAX_STEPS)

    async def look(self) -> EngineSnapshot | None:
        """The newest snapshot; None while there is no engine."""
        if self._llm.state is not EngineState.READY:
            return None
        self._begin_life()
        interval_s = MIN_INTERVAL_S
        if self._snapshot is not None:
            interval_s = max(interval_s, self._snapshot.cost_s / MAX_SHARE)
        if self._taking is None and time.monotonic() - self._taken_s >= interval_s:
            self._taking = asyncio.create_task(self._take())
        if self._taking is not None:
            await asyncio.wait((self._taking,), timeout=PATIENCE_S)
        return self._snapshot

    def _begin_life(self) -> None:
        """Forget what an engine process left that is no more."""
        if self.life != self._llm.num_restarts:
            self.life = self._llm.num_restarts
            self._snapshot = None
            self.steps.clear()

    async def _take(self) -> None:
        life = self.life
        try:
            snapshot = await self._llm.snapshot(self.steps[-1].index if self.steps else -1)
        except EngineError:
            # It died over the question; the next one finds it restarting.
            self._snapshot = None
        else:
            if life == self._llm.num_restarts:
                self._snapshot = snapshot
                self.steps.extend(snapshot.steps)
        finally:
            self._taken_s = time.monotonic()
            self._taking = None
