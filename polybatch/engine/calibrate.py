"""Measures designed steps on a loaded engine and fits the cost model of this machine to them.

    with closing(LLM(model)) as llm:
        calibration = calibrate(llm)

Every step goes through the engine's own loop, executor and sampler, several times over, in an order that
changes from round to round. Where other programs took the processors meanwhile, steps are measured again as
long as there is time, and of each the times that were disturbed least count. Where a GPU works ahead, the
kernel's count of that says little, as a launch takes twice as long beside a busy neighbour on the same core:
there the fastest visits count, and a step is visited until they agree. So what is measured, and predicted, is
a step on a quiet machine. Some steps, random mixtures, are kept out of the fit: the error is of those.
"""

from __future__ import annotations

import gc
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import torch

from polybatch import __version__
from polybatch.adapters.store import AdapterStore
from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec
from polybatch.engine.core import EngineCore
from polybatch.engine.designed_steps import (
    GIVEN,
    RANKS,
    DesignedScheduler,
    DesignedStep,
    Room,
    designs,
    mixed_designs,
)
from polybatch.engine.llm import LLM
from polybatch.engine.waited import waited_s
from polybatch.errors import ConfigError
from polybatch.execution.executor import AheadExecutor
from polybatch.request import AdapterRef, Request, SamplingParams, Sequence
from polybatch.scheduling.cost_fit import Sample, fit, quantile, relative_errors
from polybatch.scheduling.cost_profile import FORMAT, CostProfile, EngineLimits, PoolShape
from polybatch.scheduling.costs import COEFFICIENTS, CostModel, StepShape, shape_of
from polybatch.scheduling.online_cost import OnlineCost
from polybatch.scheduling.plan import AdapterLoad, Chunk, LogitRows, StepPlan

Progress = Callable[[int, int], None]
"""Told of steps done and their number."""

MAX_TIMED_STEPS, TIMED_S = 8, 0.15
"""A visit of a design times so many steps of it, fewer where they would take longer than this together."""

MAX_AHEAD_STEPS, AHEAD_S = 3, 0.06
"""The same where a GPU works ahead: more visits say more there than longer ones."""

AGREEMENT = 0.03
"""Relative difference of a step's fastest visits on a GPU from which on it is visited again."""

MAX_WAITED = 0.03
"""Share of a step's time that threads may have waited for a processor before it is measured again."""

MIN_UNDISTURBED = 3
"""Times that count of each step."""

NUM_WATCHED, NUM_WATCHED_TOKENS = 4, 24
"""Requests, and tokens of each, whose outputs are timed as a stream's."""

MAX_GIVEN = 8
"""Adapters of the user that are measured besides random ones."""

MIN_ROUNDS, MAX_ROUNDS = 2, 12
NUM_MIXED, NUM_HELD_OUT = 16, 32
FIT_SEED, TEST_SEED = 1, 4
MAX_CPU_PREFILL, MAX_CPU_PAIRS, MAX_CPU_KV_TOKENS = 1024, 1 << 20, 48 * 1024
"""A CPU takes seconds for more."""

FILL_BYTE_RANGE = 0x30, 0x3F
"""Bytes that make small, normal, positive numbers of any two as bfloat16 and of any four as float32."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A designed step: what it holds, the seconds of each time that counts, how disturbed those were.

    waited: seconds that threads waited for a processor per second of the step, in the worst of these.
    all_seconds: every time, in the order in which they were taken; of whole visits where a GPU works ahead.
    """

    shape: StepShape
    seconds: tuple[float, ...]
    waited: float
    all_seconds: tuple[float, ...] = ()

    @property
    def sample(self) -> Sample:
        return Sample(self.shape, quantile(self.seconds, 0.5))


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came of it. fitted, held_out: the measured steps on either side.

    row_output_s: what the host does for a row whose tokens are watched, which designed steps have not.
    """

    model: CostModel
    fitted: tuple[Measured, ...]
    held_out: tuple[Measured, ...]
    row_output_s: float = 0.0

    def errors(self) -> list[float]:
        """Relative errors of the steps that were held out."""
        return relative_errors(self.model, [measured.sample for measured in self.held_out])

    @property
    def p95_error(self) -> float:
        return quantile(self.errors(), 0.95)

    def profile(self, llm: LLM) -> CostProfile:
        """What there is to keep. llm: the engine that was measured."""
        config, pool = llm.config, llm.core.executor.pool
        model = replace(self.model, per_logit=self.model.per_logit + self.row_output_s)
        spec = llm.spec
        row_values = sum(sum(shape) for shape in spec.linear_shapes.values()) * spec.num_layers
        limits = config.scheduler
        measured = (*self.fitted, *self.held_out)
        return CostProfile(
            format=FORMAT,
            key=llm.cost_key,
            coefficients={name: getattr(model, name) for name in COEFFICIENTS},
            hinge=model.hinge,
            row_sizes=model.row_sizes,
            mixed_sizes=model.mixed_sizes,
            median_error=quantile(self.errors(), 0.5),
            p95_error=self.p95_error,
            num_fitted=len(self.fitted),
            num_held_out=len(self.held_out),
            num_disturbed=sum(step.waited > MAX_WAITED for step in measured),
            pool=PoolShape(
                num_pages=pool.num_pages, page_size=pool.page_size, page_bytes=pool.page_bytes,
                num_layers=pool.num_layers,
            ),
            limits=EngineLimits(
                max_num_batched_tokens=limits.max_num_batched_tokens, max_num_seqs=limits.max_num_seqs,
                max_model_len=limits.max_model_len,
            ),
            adapter_bytes_per_rank=float(row_values * (4 if config.dtype == "float32" else 2)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            version=__version__,
        )  # fmt: skip


def calibrate(
    llm: LLM, *, budget_s: float = 90.0, max_rows: int | None = None, progress: Progress | None = None
) -> Calibration:
    """Measure and fit. budget_s: after about so long no further round begins; there are at least two.

    Raises ConfigError while the engine has requests, or where its pool is too small for any step.
    """
    if llm.core.has_work():
        raise ConfigError("the engine has requests: calibrate it before it serves any")
    bench = _StepBench(llm, max_rows)
    fitted = designs(bench.room) + mixed_designs(bench.room, NUM_MIXED, FIT_SEED)
    held_out = mixed_designs(bench.room, NUM_HELD_OUT, TEST_SEED, apart_from=fitted)
    try:
        with _no_collection():
            measured = bench.measure([*fitted, *held_out], budget_s, progress)
    finally:
        bench.close()
    executor = llm.core.executor
    row_sizes = tuple(getattr(executor, "graph_sizes", ()))
    mixed_sizes = tuple(getattr(executor, "mixed_graph_sizes", ()))
    model = fit([m.sample for m in measured[: len(fitted)]], row_sizes, mixed_sizes)
    row_output_s = 0.0 if isinstance(executor, AheadExecutor) else _row_output_s(llm)
    return Calibration(model, tuple(measured[: len(fitted)]), tuple(measured[len(fitted) :]), row_output_s)


def _row_output_s(llm: LLM) -> float:
    """Seconds that the host takes for a token's text and output where a client watches; median of some steps.

    Where a device works ahead this is done while it computes.
    """
    core = llm.core
    params = SamplingParams(temperature=0.0, max_tokens=NUM_WATCHED_TOKENS, ignore_eos=True)
    for i in range(min(NUM_WATCHED, llm.config.scheduler.max_num_seqs)):
        prompt = [1 + (7 * i + j) % 100 for j in range(NUM_WATCHED_TOKENS // 2)]
        core.add_request(f"calibration-{i}", prompt, params, stream=True, cache_salt="calibration")
    seconds = []
    while core.has_work():
        before = core.times.output_s
        outputs = core.step()
        seconds += [(core.times.output_s - before) / len(outputs)] if outputs else []
    return quantile(seconds, 0.5)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's cycle collector would look at the bench's long lists of tokens in the midst of steps."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _StepBench:
    """An engine loop around a loaded executor, whose scheduler plans designed steps."""

    def __init__(self, llm: LLM, max_rows: int | None) -> None:
        core, config = llm.core, llm.config
        executor, store = core.executor, core.store
        if not isinstance(store, AdapterStore):
            raise ConfigError("this engine was put together without an adapter store")
        self._executor, self._store = executor, store
        self._page_size = executor.pool.page_size
        self._num_ids = min(1000, executor.spec.vocab_size - 1)
        is_cpu = config.device == "cpu"
        limits = config.scheduler
        given = store.list()[:MAX_GIVEN]
        num_adapters = 2 if is_cpu else 4
        self._random = self._register(_RandomAdapters(executor.spec), num_adapters)
        self._adapters = self._random | {(GIVEN, i): ref for i, ref in enumerate(given)}
        num_pages = executor.pool.num_pages
        places, self._adapter_pages = num_pages, dict[str, tuple[int, ...]]()
        for ref in self._adapters.values():
            places -= ref.num_pages
            self._adapter_pages[ref.digest] = tuple(range(places, places + ref.num_pages))
        if places < 4 * num_pages // 10:
            raise ConfigError(
                f"the pool has {num_pages:,} pages, too few for {len(self._adapters)} random adapters of up "
                f"to rank {RANKS[-1]} and KV beside them: raise memory"
            )
        kv_tokens = places * self._page_size
        self.room = Room(
            max_rows=min(limits.max_num_seqs, max_rows or limits.max_num_seqs, 64 if is_cpu else 512),
            max_prefill_tokens=min(limits.max_num_batched_tokens, MAX_CPU_PREFILL if is_cpu else 1 << 30),
            max_len=limits.max_model_len,
            max_pairs=MAX_CPU_PAIRS if is_cpu else 1 << 40,
            max_kv_tokens=min(kv_tokens, MAX_CPU_KV_TOKENS) if is_cpu else kv_tokens,
            num_adapters=num_adapters,
            num_given=len(given),
        )
        self._fill(min(places, self.room.max_kv_tokens // self._page_size + 1))
        self._scheduler = DesignedScheduler(limits, executor.pool)
        # A model that is learned would be fitted again in the midst of some steps.
        costs = OnlineCost(CostModel(base=1.0))
        self._core = EngineCore(
            executor, self._scheduler, None, store, max_model_len=limits.max_model_len, costs=costs
        )
        self._tokens = [1 + i % self._num_ids for i in range(limits.max_model_len + self.room.max_rows)]
        self._is_ahead = False
        self._seqs = [self._sequence(i) for i in range(self.room.max_rows)]
        self._seen = -1

    def measure(
        self, steps: list[DesignedStep], budget_s: float, progress: Progress | None
    ) -> list[Measured]:
        """Each step's times, in their order; a round before the others counts nothing."""
        shapes: list[StepShape] = [StepShape()] * len(steps)
        times: list[list[_Timed]] = [[] for _ in steps]
        seconds = [0.0] * len(steps)
        todo = list(range(len(steps)))
        rng = random.Random(0)
        for key in self._adapters:
            self._visit(DesignedStep((1,), loads=(key,)), 1)
        began = time.perf_counter()
        for round_ in range(MAX_ROUNDS + 1):
            rng.shuffle(todo)
            for i in todo:
                most, limit_s = (MAX_AHEAD_STEPS, AHEAD_S) if self._is_ahead else (MAX_TIMED_STEPS, TIMED_S)
                num_timed = min(most, max(1, int(limit_s / seconds[i]))) if round_ else 1
                shapes[i], timed = self._visit(steps[i], num_timed)
                seconds[i] = min(each.seconds for each in timed)
                if round_:
                    times[i] += timed
                if progress is not None:
                    progress(sum(map(bool, times)), len(steps))
                if round_ > MIN_ROUNDS and time.perf_counter() - began > budget_s:
                    break
            if round_ >= MIN_ROUNDS:
                todo = [i for i in todo if not self._is_settled(times[i])]
                if not todo or time.perf_counter() - began > budget_s:
                    break
        choose = _fastest if self._is_ahead else _least_disturbed
        return [
            Measured(shape, *choose(found), tuple(timed.seconds for timed in found))
            for shape, found in zip(shapes, times, strict=True)
        ]

    def _is_settled(self, times: list[_Timed]) -> bool:
        """Whether a step needs no further visit."""
        if not self._is_ahead:
            return sum(timed.waited <= MAX_WAITED for timed in times) >= MIN_UNDISTURBED
        fastest, _ = _fastest(times)
        return len(fastest) == MIN_UNDISTURBED and fastest[-1] <= (1 + AGREEMENT) * fastest[0]

    def _visit(self, step: DesignedStep, num_timed: int) -> tuple[StepShape, list[_Timed]]:
        """Run a step some times; the first brings page tables and fills a pipeline, which the last empties.

        Either says little of a step among others: the last one's launch is over before its time begins. Nor
        does the second of a pipeline, where launching takes longer than half a step: its time begins when it
        was launched, late. A visit of a pipeline is one time, the median of its steps.
        """
        plan = self._plan(step)
        core, scheduler, log = self._core, self._scheduler, self._core.step_log
        scheduler.next = plan
        core.step()
        self._is_ahead = core.is_ahead
        first = 1 + self._is_ahead
        if self._is_ahead:
            core.step()
        waited = [waited_s()]
        for _ in range(num_timed):
            core.step()
            # Asking takes time that a device which waits for launches would wait for as well.
            if not self._is_ahead:
                asked = time.perf_counter()
                waited.append(waited_s())
                core.leave_out(time.perf_counter() - asked)
        if self._is_ahead:
            core.step()
            waited.append(waited_s())
            # The device still has the last one.
            scheduler.next = None
            core.step()
        records = log.steps_after(self._seen)
        self._seen = records[-1].index
        seconds = [record.duration_s for record in records[first : first + num_timed]]
        if self._is_ahead:
            seconds = [quantile(seconds, 0.5)]
        timed = [
            _Timed((after - before) / (took * (num_timed if self._is_ahead else 1)), took)
            for (before, after), took in zip(pairwise(waited), seconds, strict=True)
        ]
        return shape_of(plan, self._page_size), timed

    def _plan(self, step: DesignedStep) -> StepPlan:
        """The step as a plan over the bench's own sequences and pages."""
        size, at = self._page_size, -(-step.shared // self._page_size)
        shared = list(range(at))
        wide = [(n, 1) for n in step.decodes] + list(step.prefills)
        chunks, resident = [], {}
        for i, (start, n_new) in enumerate(wide):
            seq = self._seqs[i]
            self._executor.release(seq)
            own = shared if i < len(step.decodes) else []
            count = -(-(start + n_new) // size) - len(own)
            seq.pages = own + list(range(at, at + count))
            at += count
            seq.tokens = self._tokens[i : i + start + n_new]
            seq.num_prompt = start if n_new == 1 else start + n_new
            ref = self._ref(step.adapters[i % len(step.adapters)]) if step.adapters else None
            seq.adapter = ref
            if ref is not None:
                resident[ref.digest] = self._adapter_pages[ref.digest]
            ends = n_new == 1 or step.ends
            chunks.append(Chunk(seq, start, n_new, LogitRows.LAST if ends else LogitRows.NONE))
        refs = [self._adapters[key] for key in step.loads]
        loads = tuple(AdapterLoad(ref, self._adapter_pages[ref.digest]) for ref in refs)
        return StepPlan(tuple(chunks), loads=loads, resident=resident)

    def _ref(self, key: tuple[int, int] | None) -> AdapterRef | None:
        return None if key is None else self._adapters[key]

    def _register(self, adapters: _RandomAdapters, num: int) -> dict[tuple[int, int], AdapterRef]:
        return {
            (rank, i): self._store.add_weights(f"calibration-{rank}-{i}", adapters.make(rank, i))
            for rank in RANKS
            for i in range(num)
        }

    def _sequence(self, i: int) -> Sequence:
        request = Request(f"calibration-{i}", (1,), SamplingParams(temperature=0.0), 1, 0)
        self._core.submit(request)
        return next(reversed(list(self._core.live()))).completions[0].seq

    def _fill(self, num_pages: int) -> None:
        """Give the pages of keys and values memory of their own, with numbers that keep logits finite."""
        arena: Any = self._executor
        memory: torch.Tensor = arena.arena
        pattern = torch.randint(*FILL_BYTE_RANGE, memory.shape[2:], dtype=torch.uint8, device=memory.device)
        memory[:, :num_pages] = pattern

    def close(self) -> None:
        """Leave the engine as it was."""
        for seq in self._seqs:
            self._executor.release(seq)
        for ref in self._random.values():
            self._store.remove(ref.name)


@dataclass(frozen=True, slots=True, order=True)
class _Timed:
    """A step that ran. waited: seconds that threads waited for a processor per second of it."""

    waited: float
    seconds: float


def _least_disturbed(times: list[_Timed]) -> tuple[tuple[float, ...], float]:
    """Of a step's times those that were disturbed too little to matter, or the few least disturbed."""
    ordered = sorted(times)
    kept = [timed for timed in ordered if timed.waited <= MAX_WAITED]
    if len(kept) < MIN_UNDISTURBED:
        kept = ordered[:MIN_UNDISTURBED]
    return tuple(timed.seconds for timed in kept), kept[-1].waited


def _fastest(times: list[_Timed]) -> tuple[tuple[float, ...], float]:
    """Of a step's visits the few fastest."""
    kept = sorted(times, key=lambda timed: timed.seconds)[:MIN_UNDISTURBED]
    return tuple(timed.seconds for timed in kept), max(timed.waited for timed in kept)


class _RandomAdapters:
    """Adapters on all linear layers whose values are windows of one random buffer."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        longest = max(max(shape) for shape in spec.linear_shapes.values())
        self._values = torch.randn(RANKS[-1] * longest + (1 << 20)) * 0.01
        self._at = 0

    def make(self, rank: int, number: int) -> AdapterWeights:
        shapes = self._spec.linear_shapes
        layers = tuple(
            {
                name: ModuleDelta(self._window(rank, width), self._window(rank, out))
                for name, (out, width) in shapes.items()
            }
            for _ in range(self._spec.num_layers)
        )
        return AdapterWeights(hashlib.sha256(f"calibration {rank} {number}".encode()).hexdigest(), layers)

    def _window(self, rows: int, width: int) -> torch.Tensor:
        if self._at + rows * width > len(self._values):
            self._at = 0
        start = self._at
        self._at += -(-rows * width // 32) * 32
        return self._values[start : start + rows * width].view(rows, width)
