"""Offline work by the global plan: groups of rows with a common prefix, decode-heavy ones first.

Rows of batches run group by group (`group_queue`), so a prefix is computed once, and is held only while a
member of its group runs or waits; KV that nobody waits for leaves the cache with the sequence that brought
it. A row is let in while pages last, by what it and those that run are expected to need (`page_forecast`),
not up to a number of requests: max_num_seqs is only what the executor can hold.

Live requests come before all that, first come, first served; nothing of this holds them back.
Source: BatchLLM (Zheng et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from polybatch.memory.prefix_tree import MatchResult
from polybatch.request import FinishReason, Request
from polybatch.scheduling.group_queue import GroupQueue
from polybatch.scheduling.output_lengths import OutputLengths
from polybatch.scheduling.page_forecast import PageForecast
from polybatch.scheduling.policies.base import Policy
from polybatch.scheduling.track import BATCH_PRIORITY, Key, Track

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig
    from polybatch.memory.arena import Arena
    from polybatch.scheduling.costs import StepCosts
    from polybatch.scheduling.plan import StepPlan, StepResult


class PrefixGroups(Policy):
    """Rows of batches in groups by prefix; live requests first come, first served, before them."""

    summary: ClassVar[str] = "rows of batches by common prefixes, decode-heavy groups first"
    is_planning: ClassVar[bool] = True

    def __init__(self, config: SchedulerConfig, arena: Arena, costs: StepCosts | None = None) -> None:
        super().__init__(config, arena, costs)
        self._lengths = OutputLengths()
        self._queue = GroupQueue(arena.page_size, self._lengths.expected)
        self._num_admitted = 0
        self._shared_pages: dict[Track, int] = {}
        """Of rows that have run and are live: pages of their prompts that belong to their groups."""
        self._forecast: PageForecast | None = None
        self._room = 0

    def key(self, request: Request, order: int, now: float) -> Key:
        """While a row waits: behind all that were admitted, whose keys begin with 1."""
        return (2 if request.priority >= BATCH_PRIORITY else 0, order)

    def queue(self) -> GroupQueue:
        return self._queue

    def may_admit(self, track: Track, match: MatchResult, running: Sequence[Track]) -> bool:
        """Whether pages will last; a new group also leaves room for who waits in groups that have begun."""
        if not track.is_batch:
            return True
        arena, seq = self.arena, track.seq
        bundle = self._queue.bundle_of(track)
        if bundle is not None:
            self._shared_pages[track] = bundle.prefix_tokens // arena.page_size
        forecast = self._forecast or self._look_ahead(running)
        num_idle = sum(map(arena.pool.is_cached, match.pages))
        num_pages = arena.pages_for(seq.num_tokens) - len(match.pages) + num_idle
        ref = seq.adapter
        if ref is not None and not arena.adapters.is_resident(ref.digest):
            num_pages += ref.num_pages
        room = self._room
        if bundle is not None and not bundle.has_begun:
            room -= self._num_claimed(room)
        remaining = self._lengths.remaining(seq)
        slack = -seq.num_tokens % arena.page_size
        if not forecast.fits(num_pages, slack, remaining, room):
            return False
        forecast.add(num_pages, slack, remaining)
        return True

    def num_kept(self, track: Track) -> int | None:
        return self._queue.num_wanted(track) if track.is_batch else None

    def admitted(self, track: Track, now: float) -> None:
        """Those admitted last yield first."""
        if track.is_batch:
            track.key = (1, self._num_admitted)
            self._num_admitted += 1

    def served(self, plan: StepPlan, result: StepResult) -> None:
        self._forecast = None

    def finished(self, track: Track) -> None:
        self._forecast = None
        self._shared_pages.pop(track, None)
        if track.seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._lengths.observe(track.seq)

    def _look_ahead(self, running: Sequence[Track]) -> PageForecast:
        """What those that run will need, and the pages there are for it."""
        forecast = self._forecast = PageForecast(self.arena.page_size)
        for track in running:
            own_pages = len(track.seq.pages) - self._shared_pages.get(track, 0)
            slack = max(0, track.capacity - track.seq.num_tokens)
            forecast.add_running(own_pages, slack, self._lengths.remaining(track.seq))
        watermark = max(1, self.arena.pool.num_pages // 100)
        self._room = self.arena.num_available - watermark
        return forecast

    def _num_claimed(self, limit: int) -> int:
        """Pages for those who wait in groups that have begun; not counted much beyond `limit`."""
        total = 0
        for bundle, track in self._queue.begun():
            if total > limit:
                break
            num_tokens = track.seq.num_tokens - bundle.prefix_tokens + self._lengths.remaining(track.seq)
            total += self.arena.pages_for(num_tokens - 1)
        return total
