"""The engine at one moment, for people who watch: a message from the engine process to the front.

It is made only when asked for, and says how long that took, so that whoever asks can see to it that asking
stays cheap. Lists are cut at fixed lengths; what was cut is counted.
"""

from __future__ import annotations

import enum
import itertools
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from polybatch.engine.stats import EngineStats
from polybatch.engine.step_log import RequestTrace, StepRecord
from polybatch.memory.arena import Arena
from polybatch.request import SequenceStatus

if TYPE_CHECKING:
    from polybatch.engine.core import EngineCore

MAX_CELLS = 4096
MAX_LIVE = 128
MAX_ADAPTERS = 256


class PageKind(enum.IntEnum):
    """What a page holds. KV: of running sequences. CACHED: KV that only the prefix tree holds."""

    FREE = 0
    CACHED = 1
    KV = 2
    ADAPTER = 3


class PageMap(msgspec.Struct, array_like=True, frozen=True):
    """What lies where in the pool, run-length encoded: [kind, cells, kind, cells, …].

    pages_per_cell: a cell stands for so many neighbours, the last for fewer, and shows their highest kind.
    """

    num_pages: int
    pages_per_cell: int
    runs: list[int]


class ResidentEntry(msgspec.Struct, array_like=True, frozen=True):
    """An adapter in the pool; num_users: running sequences that hold it."""

    name: str
    num_pages: int
    num_users: int
    is_pinned: bool


class EngineSnapshot(msgspec.Struct, array_like=True, frozen=True):
    """at_s: on the engine's clock. cost_s: what it took to make.

    steps: since the one that was asked for, oldest first. traces: finished requests, then live ones.
    running, waiting: sequences by adapter, "" for none; the adapters with most of them.
    """

    at_s: float
    cost_s: float
    stats: EngineStats
    steps: list[StepRecord]
    pages: PageMap
    resident: list[ResidentEntry]
    traces: list[RequestTrace]
    running: dict[str, int]
    waiting: dict[str, int]


def take_snapshot(core: EngineCore, after_step: int) -> EngineSnapshot:
    """Look at an engine between two steps. after_step: index of the last step that is known."""
    started = time.perf_counter()
    running, waiting = _by_adapter(core)
    arena = core.scheduler.arena
    snapshot = EngineSnapshot(
        at_s=time.monotonic(),
        cost_s=0.0,
        stats=core.stats(),
        steps=core.step_log.steps_after(after_step),
        pages=page_map(arena),
        resident=_resident(arena),
        traces=core.step_log.traces(itertools.islice(core.live(), MAX_LIVE)),
        running=running,
        waiting=waiting,
    )
    return msgspec.structs.replace(snapshot, cost_s=time.perf_counter() - started)


def page_map(arena: Arena, max_cells: int = MAX_CELLS) -> PageMap:
    """The pool as at most `max_cells` cells. O(num_pages), some 30 ns each."""
    pool = arena.pool
    refs = np.array(pool.refs, dtype=np.int32)
    kinds = np.where(refs > 0, PageKind.KV, PageKind.FREE).astype(np.int8)
    kinds[(refs == 1) & (np.frombuffer(pool.in_tree, dtype=np.uint8) == 1)] = PageKind.CACHED
    kinds[arena.adapters.pages()] = PageKind.ADAPTER
    per_cell = -(-pool.num_pages // max_cells)
    cells = np.maximum.reduceat(kinds, np.arange(0, pool.num_pages, per_cell))
    starts = np.concatenate(([0], np.flatnonzero(np.diff(cells)) + 1))
    lengths = np.diff(np.concatenate((starts, [len(cells)])))
    return PageMap(pool.num_pages, per_cell, np.stack((cells[starts], lengths), axis=1).ravel().tolist())


def _by_adapter(core: EngineCore) -> tuple[dict[str, int], dict[str, int]]:
    running: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for seq in core.scheduler.live():
        name = "" if seq.adapter is None else seq.adapter.name
        (running if seq.status is SequenceStatus.RUNNING else waiting)[name] += 1
    return dict(running.most_common(MAX_ADAPTERS)), dict(waiting.most_common(MAX_ADAPTERS))


def _resident(arena: Arena) -> list[ResidentEntry]:
    entries: Iterable[ResidentEntry] = (
        ResidentEntry(
            entry.ref.name, len(entry.pages), entry.num_users, entry.ref.digest in arena.adapters.pinned
        )
        for entry in arena.adapters.resident()
    )
    return sorted(entries, key=lambda entry: (-entry.num_users, entry.name))[:MAX_ADAPTERS]
