"""A trace served by the real engine in this process, with what became of it in the simulator's own terms.

One loaded model serves many runs: each gets a scheduler of its own around the same executor, so that policies
can take turns within seconds. Requests arrive in real time, by a clock that leaves out what this thread
waited for a processor that other programs had; on an idle machine it is the wall clock.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from polybatch.engine.core import EngineCore
from polybatch.engine.llm import LLM
from polybatch.request import RequestOutput, SamplingParams
from polybatch.scheduling.online_cost import OnlineCost
from polybatch.scheduling.scheduler import Scheduler
from polybatch.scheduling.track import BATCH_PRIORITY
from polybatch.simulate.engine import EngineSettings, Outcome
from polybatch.simulate.traces import Trace, TraceRequest

real_clock = time.perf_counter
_counts: int | None = None
"""An open file of the kernel's counts for this thread, for it is read at every turn."""

IDLE_S = 0.002
FIRST_TOKEN_ID = 1000
"""Ids below may mean something to the model."""


def open_clock() -> None:
    """From here on this thread, and the engine's times of steps in it, go by `clock`."""
    global _counts
    path = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    if path.exists():
        _counts = os.open(path, os.O_RDONLY)
    time.perf_counter = clock


def clock() -> float:
    """Seconds in which this thread had the processor that it wanted."""
    return real_clock() - waited_s()


def waited_s() -> float:
    """Seconds that this thread has waited for a processor, where the system counts them."""
    return 0.0 if _counts is None else int(os.pread(_counts, 64, 0).split()[1]) / 1e9


@dataclass(frozen=True, slots=True)
class Served:
    """A run. outcomes: in the trace's order; times from the first instant of the trace.

    end_s: until when it ran. busy_s: of it, in steps. waited_share: of the real time, for a processor.
    factors: by what each class of step differed from the cost model in the end. told_s: the time to the first
    token that a request was told at its arrival, by its id.
    """

    outcomes: tuple[Outcome, ...]
    end_s: float
    busy_s: float
    waited_share: float
    factors: dict[str, float]
    told_s: dict[str, float]
    num_steps: int


def engine(llm: LLM, settings: EngineSettings, costs: OnlineCost) -> EngineCore:
    """An engine around a loaded model's executor.

    No other engine may have requests there, and what others have cached is overwritten: open the model
    without a prefix cache, or use it no more.
    """
    limits = llm.config.scheduler
    config = replace(
        limits,
        policy=settings.policy,
        batching=settings.batching,
        service=settings.service,
        enable_prefix_caching=settings.enable_prefix_caching,
        max_num_batched_tokens=settings.max_num_batched_tokens or limits.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs or limits.max_num_seqs,
    )
    executor = llm.core.executor
    scheduler = Scheduler(config, executor.pool, costs=costs if settings.has_costs else None)
    return EngineCore(
        executor, scheduler, llm.tokenizer, llm.core.store, max_model_len=config.max_model_len, clock=clock,
        costs=costs,
    )  # fmt: skip


def serve(core: EngineCore, trace: Trace, clock: Callable[[], float] = clock) -> Served:
    """Run a trace until all of its live requests have ended; rows of batches end with them.

    clock: the engine's, in seconds.
    """
    outcomes = {r.request_id: Outcome(r, number) for number, r in enumerate(trace.requests)}
    prompts = {r.request_id: _tokens(r, core.executor.spec.vocab_size) for r in trace.requests}
    pending = list(reversed(trace.requests))
    num_live = sum(r.priority < BATCH_PRIORITY for r in trace.requests)
    told_s: dict[str, float] = {}
    steps_before = core.times.num_steps
    began, start, waited_before = time.monotonic(), clock(), waited_s()
    now = busy_s = 0.0
    while num_live:
        while pending and pending[-1].arrival_s <= now:
            _submit(core, pending.pop(), prompts, start)
        if not core.has_work():
            time.sleep(min(IDLE_S, max(0.0, pending[-1].arrival_s - now)))
            now = clock() - start
            continue
        before = now
        outputs = core.step()
        now = clock() - start
        busy_s += now - before
        for output in outputs:
            outcome = outcomes[output.request_id]
            _note(outcome, output, now, told_s)
            num_live -= output.finished and outcome.request.priority < BATCH_PRIORITY
    for progress in list(core.live()):
        core.abort(progress.request.request_id)
    return Served(
        tuple(outcomes.values()), now, busy_s, (waited_s() - waited_before) / (time.monotonic() - began),
        dict(core.costs.factors), told_s, core.times.num_steps - steps_before,
    )  # fmt: skip


def _submit(core: EngineCore, request: TraceRequest, prompts: dict[str, list[int]], start: float) -> None:
    params = SamplingParams(temperature=0, max_tokens=request.num_output, ignore_eos=True)
    made = core.door.prepare(
        request.request_id, prompts[request.request_id], params, priority=request.priority,
        deadlines=request.deadlines,
    )  # fmt: skip
    # It has been there since it was sent, though the step under way was not over.
    core.submit(replace(made, arrival_s=start + request.arrival_s), stream=True)


def _note(outcome: Outcome, output: RequestOutput, now: float, told_s: dict[str, float]) -> None:
    num_new = sum(len(c.token_ids) for c in output.outputs) - len(outcome.token_times)
    outcome.token_times += [now] * num_new
    if not output.finished:
        return
    outcome.finished_s, outcome.error = now, output.error
    outcome.reason = output.outputs[0].finish_reason if output.outputs else None
    metrics = output.metrics
    if metrics is not None and metrics.missed is not None and metrics.predicted_ttft_s is not None:
        told_s[output.request_id] = metrics.predicted_ttft_s
        outcome.answer = not metrics.missed


def _tokens(request: TraceRequest, vocab_size: int) -> list[int]:
    """Ids at random, the same in every run; nothing is shared."""
    rng = random.Random(request.request_id)
    first = min(FIRST_TOKEN_ID, vocab_size // 2)
    return [rng.randrange(first, vocab_size) for _ in range(request.num_input)]
