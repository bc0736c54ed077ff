"""A device made of dicts that checks every read, and a driver that checks every plan.

Each KV slot remembers for which (adapter, salt), token, position and whole history it was written. Before a
chunk runs, every earlier position of its sequence must read back exactly what that sequence
would have written itself: sharing, copy-on-write, forks, eviction and preemption are then right.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.request import (
    AdapterRef,
    Deadlines,
    Request,
    SamplingParams,
    Sequence,
    SequenceStatus,
    WorkflowStage,
)
from polybatch.scheduling.budget import MIN_PREFILL_TOKENS
from polybatch.scheduling.costs import StepCosts, shape_of
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan, StepResult
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.scheduler import Scheduler

VOCAB = 5
EOS = 0

Cell = tuple[object, ...]


def pool_of(num_pages: int, page_size: int = 4) -> PoolSpec:
    return PoolSpec(num_pages=num_pages, page_size=page_size, page_bytes=64, num_layers=1)


def adapter_of(name: str, num_pages: int = 1, version: int = 0) -> AdapterRef:
    return AdapterRef(name=name, digest=f"{name}@{version}", num_pages=num_pages)


def request_of(
    request_id: str,
    prompt: list[int] | int,
    max_tokens: int = 4,
    *,
    adapter: AdapterRef | None = None,
    priority: int = 0,
    salt: str = "",
    tenant: str = "",
    shared: int = 0,
    stop: frozenset[int] = frozenset(),
    n: int = 1,
    prompt_logprobs: int | None = None,
    min_tokens: int = 0,
    deadlines: Deadlines | None = None,
    workflow: WorkflowStage | None = None,
    arrival_s: float = 0.0,
    expected_tokens: int | None = None,
) -> Request:
    """A request whose prompt is given or, for a number, that many distinct tokens."""
    tokens = list(range(100, 100 + prompt)) if isinstance(prompt, int) else prompt
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(tokens),
        params=SamplingParams(
            n=n, prompt_logprobs=prompt_logprobs, max_tokens=max_tokens, min_tokens=min_tokens
        ),
        max_tokens=max_tokens,
        seed=len(tokens),
        stop_token_ids=stop,
        adapter=adapter,
        priority=priority,
        cache_salt=salt,
        tenant=tenant,
        num_shared_tokens=shared,
        deadlines=deadlines,
        workflow=workflow,
        arrival_s=arrival_s,
        expected_tokens=expected_tokens,
    )


class FakeDevice:
    """Pages of cells. `empty_every`: every so many samples bring no token at all."""

    def __init__(self, page_size: int, empty_every: int = 0) -> None:
        self.page_size = page_size
        self.empty_every = empty_every
        self.num_samples = 0
        self.kv: dict[int, dict[int, Cell]] = {}
        self.rows: dict[int, tuple[str, int]] = {}
        self.histories: dict[Sequence, list[Cell]] = {}
        self.scored: Counter[tuple[Sequence, int]] = Counter()

    def execute(self, plan: StepPlan) -> StepResult:
        for load in plan.loads:
            assert len(load.pages) == load.adapter.num_pages
            for index, page in enumerate(load.pages):
                self.kv.pop(page, None)
                self.rows[page] = (load.adapter.digest, index)
        for copy in plan.copies:
            self.rows.pop(copy.dst, None)
            self.kv[copy.dst] = dict(self.kv[copy.src])
        for chunk in plan.chunks:
            self._read(chunk, plan)
        slots: set[tuple[int, int]] = set()
        for chunk in plan.chunks:
            self._write(chunk, slots)
        return StepResult(tokens=tuple(self._sample(chunk) for chunk in plan.chunks))

    def history(self, seq: Sequence) -> list[Cell]:
        """What a sequence writes at each position, as a hash of everything before it."""
        cells = self.histories.setdefault(seq, [])
        digest = "" if seq.adapter is None else seq.adapter.digest
        for position in range(len(cells), seq.num_tokens):
            before = hash(cells[-1]) if cells else 0
            shared = seq.request.num_shared_tokens // self.page_size * self.page_size
            salt = "shared" if position < shared else seq.request.cache_salt
            cells.append((digest, salt, seq.tokens[position], position, before))
        return cells

    def _read(self, chunk: Chunk, plan: StepPlan) -> None:
        seq = chunk.seq
        cells = self.history(seq)
        for position in range(chunk.start):
            page = seq.pages[position // self.page_size]
            found = self.kv.get(page, {}).get(position % self.page_size)
            assert found == cells[position], f"{seq!r} reads {found} at {position}, wrote {cells[position]}"
        if seq.adapter is not None:
            pages = plan.resident[seq.adapter.digest]
            wanted = [(seq.adapter.digest, index) for index in range(seq.adapter.num_pages)]
            assert [self.rows.get(page) for page in pages] == wanted

    def _write(self, chunk: Chunk, slots: set[tuple[int, int]]) -> None:
        seq = chunk.seq
        cells = self.history(seq)
        for position in range(chunk.start, chunk.start + chunk.n_new):
            slot = (seq.pages[position // self.page_size], position % self.page_size)
            assert slot not in slots, "two sequences write to one slot"
            slots.add(slot)
            self.rows.pop(slot[0], None)
            self.kv.setdefault(slot[0], {})[slot[1]] = cells[position]
            if chunk.logits is LogitRows.ALL:
                self.scored[seq, position] += 1

    def _sample(self, chunk: Chunk) -> tuple[int, ...]:
        seq = chunk.seq
        if chunk.logits is LogitRows.NONE or chunk.start + chunk.n_new < seq.num_tokens:
            return ()
        self.num_samples += 1
        if self.empty_every and self.num_samples % self.empty_every == 0:
            return ()
        # Without the sequence's index, so that siblings also meet equal continuations.
        return (hash((seq.request.seed, seq.num_tokens, seq.num_tokens % 3 and seq.index)) % VOCAB,)


class Driver:
    """Runs a scheduler on the fake device and checks the laws of every step."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PoolSpec,
        *,
        empty_every: int = 0,
        check_every: int = 1,
        costs: StepCosts | None = None,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config, pool, costs=costs)
        self.costs = costs
        self.device = FakeDevice(pool.page_size, empty_every)
        self.check_every = check_every
        self.now = 0.0
        self.live: list[Sequence] = []
        self.given_up: list[str] = []
        self.plans: list[StepPlan] = []

    def add(self, request: Request) -> list[Sequence]:
        sequences = self.scheduler.add(request, self.now)
        self.live += sequences
        return sequences

    def abort(self, request_id: str) -> list[Sequence]:
        ended = self.scheduler.abort(request_id)
        self.forget_ended()
        return ended

    def plan(self) -> StepPlan | None:
        """Plan a step and check what must hold for every plan. A step takes a second, or what it costs."""
        self.now += 1 if self.costs is None else 0
        for request_id, told in self.scheduler.to_abort(self.now):
            assert told
            self.given_up.append(request_id)
            self.abort(request_id)
        is_stall_free = self.config.batching == "stall_free"
        decoding = [seq for seq in self.live if seq.status is SequenceStatus.RUNNING and is_decoding(seq)]
        if self.costs is not None:
            # Rows of batches may be paused for live requests' sake.
            decoding = [seq for seq in decoding if seq.request.priority < BATCH_PRIORITY]
        first = self.scheduler._tracks.running[0].seq if self.scheduler._tracks.running else None
        plan = self.scheduler.plan(self.now)
        if plan is None:
            assert not self.live
            return None
        planned = {chunk.seq: chunk for chunk in plan.chunks}
        assert len(planned) == len(plan.chunks)
        may_yield = first is None or first.request.priority >= BATCH_PRIORITY
        may_yield = may_yield or not is_stall_free or self.config.policy == "deadline"
        assert may_yield or first in planned, "the first in order did not progress"
        for seq in decoding:
            assert not is_stall_free or seq in planned or seq in plan.preempted, "a decode was skipped"
        num_decodes = sum(is_decoding(chunk.seq) for chunk in plan.chunks)
        limit = self.config.max_num_batched_tokens
        num_prefill = plan.num_tokens - num_decodes
        if self.costs is None:
            assert num_prefill <= max(limit - num_decodes, min(MIN_PREFILL_TOKENS, limit))
        assert num_prefill <= limit
        assert plan.num_tokens <= limit + self.config.max_num_seqs
        assert not set(planned) & set(plan.preempted)
        for seq, start, n_new, rows in plan.chunks[: plan.num_decodes]:
            assert is_decoding(seq), "a chunk that is said to decode does not"
            assert (start, n_new, rows) == (seq.num_computed, 1, LogitRows.LAST)
        if self.costs is None and is_stall_free:
            assert plan.num_decodes >= sum(seq in planned for seq in decoding), "known decodes come first"
        known = shape_of(plan, self.device.page_size)
        assert known == shape_of(replace(plan, num_decodes=0), self.device.page_size)
        used = {seq.adapter.digest for seq in planned if seq.adapter is not None}
        assert set(plan.resident) == used
        self.plans.append(plan)
        return plan

    def step(self) -> list[Sequence]:
        plan = self.plan()
        return [] if plan is None else self.complete(plan)

    def complete(self, plan: StepPlan) -> list[Sequence]:
        if self.costs is not None:
            self.now += self.costs.predict(shape_of(plan, self.device.page_size))
        finished = self.scheduler.commit(plan, self.device.execute(plan))
        for seq in finished:
            assert seq.num_computed == seq.num_tokens - 1
            if seq.request.params.prompt_logprobs is not None and seq.index == 0:
                counts = [self.device.scored.pop((seq, position), 0) for position in range(seq.num_prompt)]
                assert set(counts) == {1}, "a prompt position was scored more or less than once"
        self.forget_ended()
        if self.check_every and len(self.plans) % self.check_every == 0:
            self.scheduler.check()
        return finished

    def run(self, max_steps: int = 100_000) -> None:
        """Step until everything has ended."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"still at work after {max_steps} steps"
        assert not self.live
        self.scheduler.check()
        assert self.scheduler.stats().num_kv_pages == 0, "an ended sequence left pages behind"

    def forget_ended(self) -> None:
        for seq in self.live:
            if seq.status is SequenceStatus.FINISHED:
                self.device.histories.pop(seq, None)
        self.live = [seq for seq in self.live if seq.status is not SequenceStatus.FINISHED]


def is_decoding(seq: Sequence) -> bool:
    return seq.num_uncomputed == 1 and seq.num_computed >= seq.num_prompt


def random_request(rng: random.Random, request_id: str, adapters: list[AdapterRef], max_len: int) -> Request:
    """Short alphabets and a few common prefixes make prefixes meet often."""
    prefix = [1 + index % 3 for index in range(rng.choice([0, 0, 4, 9, 16, 25]))]
    prompt = prefix + [rng.randrange(1, 4) for _ in range(rng.randint(1, 12))]
    prompt = prompt[: max(1, max_len // 2)]
    return request_of(
        request_id,
        prompt,
        rng.randint(1, max(1, max_len - len(prompt))),
        adapter=rng.choice([None, *adapters]) if rng.random() < 0.7 else None,
        priority=rng.randrange(3),
        salt=rng.choice(["", "", "tenant"]),
        tenant=rng.choice("abc"),
        shared=rng.choice([0, 0, len(prefix)]),
        stop=frozenset({EOS}) if rng.random() < 0.5 else frozenset(),
        n=rng.choice([1, 1, 1, 2, 4]),
        prompt_logprobs=0 if rng.random() < 0.15 else None,
    )
