"""Steps that are made up to be measured: which ones, and a scheduler that plans just these.

Keys and values may be anything, so a decode of 32 rows at 4,000 tokens needs no prefill before it: its rows
are given pages and read what lies there. Everything else is the engine's own step. `designs` are what a cost
model is fitted to: one amount grows at a time. `mixed_designs` are what it is judged by: anything with
anything.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.errors import EngineError
from polybatch.request import FinishReason, Request, Sequence, SequenceStatus
from polybatch.scheduling.plan import StepPlan, StepResult
from polybatch.scheduling.scheduler import Scheduler

RANKS = (8, 16, 32, 64)
"""Of random adapters."""

GIVEN = 0
"""Stands for the rank of an adapter that the user gave."""


@dataclass(frozen=True, slots=True)
class DesignedStep:
    """What a step holds.

    decodes: tokens in front of each decoding row's own, of which `shared` are the same for all.
    prefills: (tokens in front, new tokens) of each prefill chunk; ends: they end here and need logits.
    adapters: (rank, number); rows have them in turn, decodes first, None being none.
    loads: adapters that are loaded before.
    """

    decodes: tuple[int, ...] = ()
    prefills: tuple[tuple[int, int], ...] = ()
    shared: int = 0
    ends: bool = False
    adapters: tuple[tuple[int, int] | None, ...] = ()
    loads: tuple[tuple[int, int], ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + len(self.prefills)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(n_new for _, n_new in self.prefills)

    @property
    def max_len(self) -> int:
        return max([n + 1 for n in self.decodes] + [sum(chunk) for chunk in self.prefills])

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of KV that its rows hold, shared ones once, each row's last page counted in full."""
        own = sum(n - self.shared + 17 for n in self.decodes) + sum(sum(c) + 16 for c in self.prefills)
        return own + self.shared


@dataclass(frozen=True, slots=True)
class Room:
    """How large steps may be. num_adapters: random ones of each rank; num_given: adapters of the user's."""

    max_rows: int
    max_prefill_tokens: int
    max_len: int
    max_pairs: int
    max_kv_tokens: int
    num_adapters: int
    num_given: int = 0

    def holds(self, step: DesignedStep) -> bool:
        return (
            0 < step.num_rows <= self.max_rows
            and step.num_prefill_tokens <= self.max_prefill_tokens
            and step.max_len <= self.max_len
            and sum(n * (start + n) for start, n in step.prefills) <= self.max_pairs
            and step.num_kv_tokens <= self.max_kv_tokens
        )


def designs(room: Room) -> list[DesignedStep]:
    """The steps that a model is fitted to, as far as there is room."""
    unique = dict.fromkeys(step for step in _designs(room) if room.holds(step))
    return list(unique)


def _designs(room: Room) -> Iterator[DesignedStep]:
    batches = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for batch in batches:
        for context in (32, 512, 2048, 8000) if batch in (1, 4, 16, 64, 256) else (256,):
            yield DesignedStep((context,) * batch)
    yield DesignedStep(tuple(16 * 2**i for i in range(8)) * 2)
    for n_new in (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192):
        yield DesignedStep(prefills=((0, n_new),), ends=n_new % 3 == 0 or n_new == 512)
    for start, n_new in (
        (1024, 64), (1024, 512), (4000, 64), (4000, 256), (7000, 1024), (16000, 32), (16000, 256),
        (30000, 64),
    ):  # fmt: skip
        yield DesignedStep(prefills=((start, n_new),))
    for count, n_new in ((4, 16), (4, 64), (16, 32), (8, 128), (8, 512), (64, 64), (64, 128)):
        yield DesignedStep(prefills=((0, n_new),) * count, ends=True)
    for batch, context, start, n_new in (
        (4, 256, 0, 64), (8, 1024, 0, 256), (16, 512, 512, 128), (32, 256, 0, 512), (64, 512, 0, 128),
        (128, 512, 1024, 512), (128, 256, 0, 2048), (32, 8000, 0, 512), (32, 8000, 0, 32), (192, 1024, 0, 32),
        (32, 1024, 16000, 32),
    ):  # fmt: skip
        yield DesignedStep((context,) * batch, ((start, n_new),))
    for batch, shared, own in ((8, 512, 64), (32, 1024, 64), (64, 2048, 128), (128, 1024, 256)):
        yield DesignedStep((shared + own,) * batch, shared=shared)
    if room.num_adapters:
        yield from _adapter_designs(room.num_adapters)
    for i in range(room.num_given):
        given = ((GIVEN, i),)
        yield DesignedStep((256,) * 16, adapters=given)
        yield DesignedStep(prefills=((0, 256),), adapters=given)
        yield DesignedStep((256,) * 8, loads=given)


def _adapter_designs(num: int) -> Iterator[DesignedStep]:
    for rank in RANKS:
        yield DesignedStep((256,) * 8, adapters=((rank, 0),))
    every = tuple((rank, i) for i in range(num) for rank in RANKS)
    for batch in (1, 32, 64, 128):
        yield DesignedStep((256,) * batch, adapters=((16, 0),))
        yield DesignedStep((256,) * batch, adapters=every)
    yield DesignedStep((256,) * 32, adapters=((64, 0), None))
    yield DesignedStep((256,) * 16, adapters=tuple((64, i) for i in range(num)))
    for rank, n_new in ((8, 64), (64, 64), (16, 512), (64, 512), (16, 2048)):
        yield DesignedStep(prefills=((0, n_new),), adapters=((rank, 0),))
    yield DesignedStep((256,) * 16, ((0, 64),) * 4, adapters=every)
    # A GPU has kernels for adapters of few tokens, others for those of many.
    few, some = every[: len(RANKS)], ((16, 0), (64, 0), None)
    for batch, n_new in ((2, 16), (16, 16), (48, 32), (2, 256), (16, 256), (48, 512)):
        yield DesignedStep((256,) * batch, ((0, n_new),), adapters=few)
    yield DesignedStep(prefills=((0, 256),) * 3, adapters=few)
    yield DesignedStep((512,) * 8, ((0, 512),) * 4, adapters=every)
    yield DesignedStep((256,) * 16, ((0, 1024), (512, 512)), adapters=some)
    yield DesignedStep((256,) * 8, ((0, 4096),), adapters=((64, 0),))
    yield DesignedStep((1024,) * 4, ((0, 2048),) * 3, adapters=few)
    for rank in RANKS:
        yield DesignedStep((256,) * 8, loads=((rank, 0),))
    yield DesignedStep((256,) * 4, ((0, 256),), loads=((16, 0), (32, 0)))


def mixed_designs(
    room: Room, count: int, seed: int, apart_from: Collection[DesignedStep] = ()
) -> list[DesignedStep]:
    """Random steps, decodes and prefills of all lengths, half with adapters; none of `apart_from`."""
    rng = random.Random(seed)
    found: list[DesignedStep] = []
    while len(found) < count:
        step = _random_step(rng, room)
        if room.holds(step) and step not in apart_from:
            found.append(step)
    return found


def _random_step(rng: random.Random, room: Room) -> DesignedStep:
    def spread(low: int, high: int) -> int:
        """Uniform in the logarithm."""
        return int(low * (max(low, high) / low) ** rng.random())

    num_decodes = spread(1, room.max_rows) if rng.random() < 0.9 else 0
    top = spread(64, room.max_len - 1)
    decodes = tuple(rng.randrange(16, top) for _ in range(num_decodes))
    prefills = []
    if rng.random() < 0.7 or not decodes:
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            start = 0 if rng.random() < 0.6 else spread(16, room.max_len // 2)
            prefills.append((start, spread(8, min(room.max_prefill_tokens, room.max_len - start - 1) // 2)))
    adapters: list[tuple[int, int] | None] = []
    loads = []
    if room.num_adapters and rng.random() < 0.5:
        adapters = [(rng.choice(RANKS), rng.randrange(room.num_adapters)) for _ in range(spread(1, 32))]
        if rng.random() < 0.3:
            adapters.append(None)
        if rng.random() < 0.3:
            loads = [(rng.choice(RANKS), rng.randrange(room.num_adapters))]
    return DesignedStep(
        decodes, tuple(prefills), ends=rng.random() < 0.5, adapters=tuple(adapters), loads=tuple(loads)
    )


class DesignedScheduler(Scheduler):
    """Plans the step it was told to, again and again; its sequences run for ever and gain no tokens."""

    def __init__(self, config: SchedulerConfig, pool: PoolSpec) -> None:
        super().__init__(config, pool)
        self.next: StepPlan | None = None

    def add(self, request: Request, now: float) -> list[Sequence]:
        seq = Sequence(request)
        seq.status = SequenceStatus.RUNNING
        return [seq]

    def plan(self, now: float) -> StepPlan | None:
        return self.next

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        return []

    def settle(self, seq: Sequence, position: int, token: int) -> bool:
        return False

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        raise EngineError(f"{seq!r} failed in a step that was to be measured: its logits are not finite")

    def abort(self, request_id: str) -> list[Sequence]:
        return []

    def discard(self, plan: StepPlan) -> list[Sequence]:
        return []
