"""What the equivalence gate is made of: runs that keep their logits, and the comparison of two runs.

A mixed run answers many prompts of many adapters at once, in a pool and with a token budget so small
that prompts are prefilled in chunks, prefixes are shared and sequences are preempted. References answer
the same prompts one by one, or score the mixed run's answers. Which references there are is the business
of `polybatch.engine.selfcheck`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec, PoolSpec, SchedulerConfig
from polybatch.engine.core import EngineCore
from polybatch.engine.ports import AdapterSource
from polybatch.errors import ConfigError, EngineError
from polybatch.execution.executor import Executor
from polybatch.request import FinishReason, Request, SamplingParams
from polybatch.request import Sequence as RunningSequence
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan, StepResult
from polybatch.scheduling.scheduler import Scheduler
from polybatch.scheduling.track import SchedulerStats

NEAR_TIE = 1e-3
"""Two best logits of a reference that are closer may change places; such tokens are counted."""

PREFILL_TOKENS = 40
"""Prefill tokens per step of a mixed run: too few for a long prompt, enough to progress."""

_POOL_SIZES = 48


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens of one request and the logits they were picked from, [len(tokens), vocab] float32."""

    tokens: list[int]
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pressure:
    """What a mixed run was put through.

    num_chunked_prompts: prefilled in more than one step. max_adapters: most in one step, where all base
    rows count as one.
    """

    num_steps: int
    num_chunked_prompts: int
    max_adapters: int
    num_prefix_hit_tokens: int
    num_preemptions: int

    @property
    def is_complete(self) -> bool:
        return bool(self.num_chunked_prompts and self.num_prefix_hit_tokens and self.num_preemptions)


class PlanCounter:
    """Watches the plans of a run go by."""

    def __init__(self) -> None:
        self._num_steps = self._max_adapters = 0
        self._chunked: set[RunningSequence] = set()

    def add(self, plan: StepPlan) -> None:
        self._num_steps += 1
        self._max_adapters = max(self._max_adapters, len({c.seq.adapter for c in plan.chunks}))
        self._chunked.update(c.seq for c in plan.chunks if c.logits is LogitRows.NONE)

    def pressure(self, stats: SchedulerStats) -> Pressure:
        return Pressure(
            self._num_steps,
            len(self._chunked),
            self._max_adapters,
            stats.num_prefix_hit_tokens,
            stats.num_preemptions,
        )


class LogitRecorder:
    """An `Executor` that passes everything on to another one and keeps the rows that tokens are picked from.

    logits: request id -> one row per output token, [vocab] float32.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.logits: dict[str, list[torch.Tensor]] = {}
        self.counter = PlanCounter()

    @property
    def spec(self) -> ModelSpec:
        return self._executor.spec

    @property
    def pool(self) -> PoolSpec:
        return self._executor.pool

    def adapter_pages(self, weights: AdapterWeights) -> int:
        return self._executor.adapter_pages(weights)

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        logits = self._executor.forward(plan, adapters)
        self.counter.add(plan)
        sampled = [chunk for chunk in plan.chunks if chunk.logits is LogitRows.LAST]
        for chunk, row in zip(sampled, logits, strict=True):
            self.logits.setdefault(chunk.seq.request.request_id, []).append(row.to("cpu", copy=True))
        return logits

    def release(self, seq: RunningSequence) -> None:
        self._executor.release(seq)

    def describe(self) -> dict[str, str]:
        return self._executor.describe()

    def close(self) -> None:
        self._executor.close()


def run_requests(
    executor: Executor, requests: Sequence[Request], adapters: AdapterSource, scheduler: Scheduler
) -> tuple[list[Answer], Pressure]:
    """Answer all requests, submitted at once, through an engine of their own; answers in their order.

    Requests must be greedy and without prompt log-probabilities. Raises EngineError if one fails.
    """
    recorder = LogitRecorder(executor)
    core = EngineCore(recorder, scheduler, None, adapters, max_model_len=executor.spec.max_position)
    for request in requests:
        core.submit(request)
    tokens: dict[str, list[int]] = {}
    while core.has_work():
        for output in core.step():
            completion = output.outputs[0]
            if output.error is not None or completion.finish_reason is FinishReason.ERROR:
                raise EngineError(f"request {output.request_id} failed: {output.error}")
            tokens[output.request_id] = completion.token_ids
    answers = [Answer(tokens[r.request_id], torch.stack(recorder.logits.pop(r.request_id))) for r in requests]
    return answers, recorder.counter.pressure(scheduler.stats())


def mixed_scheduler(requests: Sequence[Request], pool: PoolSpec, limits: SchedulerConfig) -> Scheduler:
    """A scheduler that will chunk prompts, share prefixes and preempt while it serves these requests.

    limits: of the executor; the token budget is smaller. The scheduler gets the part of the pool in which,
    in rehearsals without a model, most adapters meet in one step and most sequences are preempted.
    Raises ConfigError if the requests leave no choice.
    """
    config = replace(
        limits,
        max_num_batched_tokens=min(PREFILL_TOKENS, limits.max_num_batched_tokens),
        enable_prefix_caching=True,
    )
    refs = {r.adapter.digest: r.adapter.num_pages for r in requests if r.adapter is not None}
    kv = [_kv_pages(r, pool.page_size) for r in requests]
    pages = [n + (r.adapter.num_pages if r.adapter else 0) for n, r in zip(kv, requests, strict=True)]
    least, most = max(pages), min(sum(kv) + sum(refs.values()), pool.num_pages)
    rehearsed: dict[int, Pressure] = {}
    for part in range(_POOL_SIZES + 1):
        num_pages = least + max(0, most - least) * part // _POOL_SIZES
        if num_pages not in rehearsed:
            scheduler = Scheduler(config, replace(pool, num_pages=num_pages))
            rehearsed[num_pages] = _rehearse(requests, scheduler)
    complete = {size: pressure for size, pressure in rehearsed.items() if pressure.is_complete}
    if not complete:
        raise ConfigError(
            f"{len(requests)} prompts of {min(kv)} to {max(kv)} pages of {pool.page_size} tokens cannot be "
            "made to share prefixes, to be cut into chunks and to preempt each other: give more or longer"
        )
    chosen = max(complete, key=lambda size: (complete[size].max_adapters, complete[size].num_preemptions))
    return Scheduler(config, replace(pool, num_pages=chosen))


def _kv_pages(request: Request, page_size: int) -> int:
    return -(-(len(request.prompt_token_ids) + request.max_tokens - 1) // page_size)


def _rehearse(requests: Sequence[Request], scheduler: Scheduler) -> Pressure:
    """Serve requests without a model: every output token is 0."""
    for request in requests:
        scheduler.add(request, 0.0)
    counter = PlanCounter()
    while (plan := scheduler.plan(0.0)) is not None:
        counter.add(plan)
        tokens = tuple(() if c.logits is LogitRows.NONE else (0,) for c in plan.chunks)
        scheduler.commit(plan, StepResult(tokens))
    return counter.pressure(scheduler.stats())


def answer_alone(
    executor: Executor, request: Request, adapters: AdapterSource, limits: SchedulerConfig
) -> Answer:
    """Answer a request as the only one, in a fresh engine without prefix caching."""
    config = replace(limits, max_num_seqs=1, enable_prefix_caching=False)
    return run_requests(executor, [request], adapters, Scheduler(config, executor.pool))[0][0]


def follow_alone(
    executor: Executor, request: Request, answer: Answer, adapters: AdapterSource, limits: SchedulerConfig
) -> Iterator[tuple[Answer, Answer]]:
    """Pairs of (part of the answer, the same part answered alone), together the whole answer.

    Where the tokens differ, the run alone goes on from the answer's tokens, so that every position is
    compared after equal tokens.
    """
    done, total = 0, len(answer.tokens)
    while done < total:
        prompt = (*request.prompt_token_ids, *answer.tokens[:done])
        rest = replace(request, prompt_token_ids=prompt, max_tokens=total - done)
        alone = answer_alone(executor, rest, adapters, limits)
        pairs = zip(alone.tokens, answer.tokens[done:], strict=True)
        num_equal = next((i for i, (a, b) in enumerate(pairs) if a != b), total - done)
        end = min(done + num_equal + 1, total)
        yield (
            Answer(answer.tokens[done:end], answer.logits[done:end]),
            Answer(alone.tokens[: end - done], alone.logits[: end - done]),
        )
        done = end


def score(executor: Executor, tokens: Sequence[int], first: int, chunk_tokens: int) -> torch.Tensor:
    """Logits after tokens[:first], tokens[:first + 1] … tokens, [len(tokens) - first + 1, vocab] float32.

    The only sequence in the executor, without an adapter, in chunks of at most `chunk_tokens`.
    """
    seq = RunningSequence(Request("score", tuple(tokens), SamplingParams(), max_tokens=1, seed=0))
    seq.pages = list(range(-(-len(tokens) // executor.pool.page_size)))
    parts = []
    for start in range(0, len(tokens), chunk_tokens):
        chunk = Chunk(seq, start, min(chunk_tokens, len(tokens) - start), LogitRows.ALL)
        logits = executor.forward(StepPlan(chunks=(chunk,)), {})
        parts.append(logits[max(0, first - 1 - start) :].to("cpu", copy=True))
    executor.release(seq)
    return torch.cat(parts)


class Tally:
    """Counts of one comparison. limit: largest allowed difference of logits; 0 asks for equal bits."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.num_rows = self.num_tokens = self.num_differences = self.num_near_ties = 0
        self.max_logit_difference = 0.0
        self._is_within_limit = True

    def add(self, got: Answer, expected: Answer) -> None:
        """Compare answers, or equal parts of them, position by position after equal tokens."""
        if got.logits.shape != expected.logits.shape or got.logits.shape[0] != len(got.tokens):
            raise EngineError(f"logits of {got.logits.shape} cannot be compared with {expected.logits.shape}")
        best = expected.logits.topk(2, dim=-1).values
        for a, b, (first, second) in zip(got.tokens, expected.tokens, best.tolist(), strict=True):
            if a != b:
                self.num_differences += 1
                self.num_near_ties += first - second < NEAR_TIE
        self.num_tokens += len(got.tokens)
        difference = float((got.logits - expected.logits).abs().max())
        # Written so that NaN, which compares with nothing, is out of limits.
        is_equal = torch.equal(got.logits.view(torch.int32), expected.logits.view(torch.int32))
        self._is_within_limit &= difference <= self.limit if self.limit else is_equal
        if not difference <= self.max_logit_difference:
            self.max_logit_difference = difference

    @property
    def is_ok(self) -> bool:
        """Something was compared, and nothing differs but tokens whose logits all but tie."""
        return bool(self.num_tokens) and self._is_within_limit and self.num_differences == self.num_near_ties
