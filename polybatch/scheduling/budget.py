"""How many prefill tokens a step may carry beside its decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polybatch.request import Sequence
from polybatch.scheduling.plan import Chunk
from polybatch.scheduling.track import Track
from polybatch.scheduling.waiting import Waiting

if TYPE_CHECKING:
    from polybatch.config import SchedulerConfig
    from polybatch.memory.arena import Arena
    from polybatch.scheduling.costs import StepCosts

MIN_PREFILL_TOKENS = 32
"""Prefill tokens a step keeps room for however many sequences decode, so that prompts never starve."""


@dataclass(slots=True)
class StepSoFar:
    """A step whose decodes are planned and whose prefills are not; to be looked at only.

    chunks: the decodes. track_of: every live sequence. prefills: running, in the order that they get chunks.
    waiting: who may be admitted after them.
    """

    now: float
    chunks: list[Chunk]
    track_of: Mapping[Sequence, Track]
    prefills: list[Track]
    waiting: Waiting


class PrefillBudget:
    """A fixed number of tokens, of which decodes take their part."""

    def __init__(self, config: SchedulerConfig, arena: Arena, costs: StepCosts | None) -> None:
        self._limit = config.max_num_batched_tokens
        self._floor = min(MIN_PREFILL_TOKENS, self._limit)

    def tokens(self, step: StepSoFar) -> int:
        """Prefill tokens of a step: what decodes leave, yet never less than a minimal chunk."""
        return max(self._limit - len(step.chunks), self._floor)
