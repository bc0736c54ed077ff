"""The plan of one step: pure data between the scheduler and whatever executes it.

    Scheduler.plan(now) -> StepPlan -> executor -> StepResult -> Scheduler.commit

A step is one forward pass over the new tokens of some sequences. Prefill, decode, verification
and scoring differ only in how many tokens a chunk has and which of its rows need logits.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import NamedTuple

from polybatch.request import AdapterRef, Sequence

PENDING = -1
"""Stands in a sequence for a token that the device has yet to tell: the newest, of the step in flight."""


class LogitRows(enum.Enum):
    """Which rows of a chunk need logits: none (more prefill follows), the last, or all of them."""

    NONE = 0
    LAST = 1
    ALL = 2


class Chunk(NamedTuple):
    """`n_new` tokens of a sequence from position `start`; their KV slots are already in its pages."""

    seq: Sequence
    start: int
    n_new: int
    logits: LogitRows


_NUM_COMPUTED = attrgetter("num_computed")
_new_chunk = partial(tuple.__new__, Chunk)


def decode_chunks(seqs: list[Sequence]) -> Iterable[Chunk]:
    """The newest token of each of these; all in C, since most steps are hundreds of these."""
    starts = map(_NUM_COMPUTED, seqs)
    return map(_new_chunk, zip(seqs, starts, repeat(1), repeat(LogitRows.LAST)))


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy a whole page, in every layer, before the step runs (copy-on-write)."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Write an adapter's rows into these pages before the step runs."""

    adapter: AdapterRef
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything an executor needs for one step.

    Loads come first, then copies, then the forward pass. Among the loads may be adapters that no chunk
    uses yet: their first request still waits. `resident` maps each adapter of the chunks to its
    pages (table order = page order within the adapter). The first `num_decodes` chunks are the newest
    tokens of sequences that decode, so that nobody need look; what follows may hold some more.
    """

    chunks: tuple[Chunk, ...]
    copies: tuple[PageCopy, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    resident: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Adapter digest -> its pages, for the adapters that the chunks use."""
    num_decodes: int = 0
    preempted: tuple[Sequence, ...] = ()
    """Sequences that lost their pages in this plan; the executor forgets them before anything else."""

    @property
    def num_tokens(self) -> int:
        return self.num_decodes + sum(chunk.n_new for chunk in self.chunks[self.num_decodes :])


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced, in the plan's order of chunks.

    tokens: per chunk the new tokens, empty where the plan asked for no logits. PENDING for one that is
        still being computed; `Scheduler.settle` puts it in.
    duration_s: time of the forward pass.
    """

    tokens: tuple[tuple[int, ...], ...]
    duration_s: float = 0.0
