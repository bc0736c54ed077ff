"""The loop: requests in at the door, one ragged step at a time, outputs out.

    door -> submit -> [ plan -> forward -> sample -> commit -> text and outputs ]* -> RequestOutput

Where the device samples by itself, step n + 1 is planned and started before the tokens of step n are
looked at (`_advance`), so that Python works while the device does.

The core decides nothing itself: the scheduler chooses what runs, the executor runs it, the sampler
picks tokens. It owns the order of these calls, and who hears of an error: a request alone where the
fault is its own, all requests in flight where a step fails. Not thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from polybatch.adapters.weights import AdapterWeights
from polybatch.engine.door import Door
from polybatch.engine.outputs import Completion, Progress, score_prompt
from polybatch.engine.ports import AdapterSource, TextTokenizer
from polybatch.engine.stats import DeadlineCounts, EngineStats, StepTimes
from polybatch.engine.step_log import StepLog
from polybatch.errors import DeadlineError, EngineError, RequestError
from polybatch.execution.executor import AheadExecutor, Executor, Launch
from polybatch.mixture import AdapterChoice
from polybatch.request import FinishReason, Request, RequestOutput, SamplingParams, Sequence, SequenceStatus
from polybatch.sampling.sampler import Sampled, Sampler
from polybatch.scheduling.costs import StepShape, shape_of
from polybatch.scheduling.online_cost import OnlineCost
from polybatch.scheduling.plan import PENDING, LogitRows, StepPlan, StepResult
from polybatch.scheduling.scheduler import Scheduler


@dataclass(slots=True)
class Flight:
    """A step on its way: what was planned, and who gets a token from which row of its logits.

    logits: where the host samples. launch: where the device does; then positions are the indices of the
    PENDING tokens in their sequences, and ended the sequences that end with them. started: on `perf_counter`,
    when its planning began, or, where the step before left work, that step's end. predicted_s: what was
    expected of it, None where nothing was.
    """

    plan: StepPlan
    picked: list[Completion]
    rows: list[int]
    logits: torch.Tensor | None = None
    launch: Launch | None = None
    positions: list[int] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    shape: StepShape = field(default_factory=StepShape)
    started: float = 0.0
    predicted_s: float | None = None


class EngineCore:
    """Runs requests step by step over one executor, scheduler and adapter store.

    tokenizer: None for token ids in and out only. store: None for no adapters.
    max_model_len: prompt + output in tokens.
    seed: requests without their own get one from it and from how many came before.
    clock: seconds, monotonic. costs: what steps are expected to take; learns from every step.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        tokenizer: TextTokenizer | None = None,
        store: AdapterSource | None = None,
        *,
        max_model_len: int,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        costs: OnlineCost | None = None,
    ) -> None:
        self.executor, self.scheduler = executor, scheduler
        self._ahead = executor if isinstance(executor, AheadExecutor) else None
        self.tokenizer, self.store = tokenizer, store
        pool = executor.pool
        pool_tokens = pool.num_pages * pool.page_size
        self.door = Door(executor.spec, max_model_len, tokenizer, store, seed, clock, pool_tokens=pool_tokens)
        self.times = StepTimes()
        self.step_log = StepLog(scheduler.arena.adapters.is_resident)
        self.costs = OnlineCost() if costs is None else costs
        self._clock = clock
        self._landed = 0.0
        self._goes_on = False
        """Whether the step before left work, so that the time since is the next one's."""
        self._sampler = Sampler(executor.spec.vocab_size)
        self._requests: dict[str, Progress] = {}
        self._live: dict[Sequence, Completion] = {}
        self._finished: list[RequestOutput] = []
        self._flight: Flight | None = None
        self._num_submitted = self._num_finished = 0
        self.deadline_counts = DeadlineCounts()
        self._num_prompt_tokens = self._num_output_tokens = 0

    @property
    def max_model_len(self) -> int:
        return self.door.max_model_len

    def encode_chat(self, messages: SequenceOf[Mapping[str, Any]], **template_args: Any) -> list[int]:
        """Token ids of a conversation up to where the answer begins. Raises RequestError."""
        return self.door.encode_chat(messages, **template_args)

    def submit(self, request: Request, *, stream: bool = False) -> None:
        """Queue a prepared request; stream: `step` returns it after every step that adds to it.

        Raises RequestError if its id is in use or it could not run even alone.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request_id {request.request_id!r} is in use: choose another", field="request_id"
            )
        structured = request.params.structured
        grammar = None if structured is None else self.door.grammars.compile(structured)
        if request.adapter is not None and request.adapter.parts and self.store is not None:
            request = replace(request, adapter=self.store.mix(request.adapter))
        seqs = self.scheduler.add(request, self._clock())
        if request.adapter is not None and self.store is not None:
            self.store.hold(request.adapter.digest)
        progress = Progress(request, stream)
        progress.completions = [Completion(seq, progress, self.tokenizer, grammar) for seq in seqs]
        progress.num_live = len(seqs)
        self._live.update(zip(seqs, progress.completions, strict=True))
        progress.answer = self.scheduler.answer(request.request_id)
        progress.deadlines = self.scheduler.deadlines_of(request)
        self._requests[request.request_id] = progress
        self.step_log.submitted(progress)
        self._num_submitted += 1
        self._num_prompt_tokens += len(request.prompt_token_ids)

    def add_request(
        self,
        request_id: str,
        prompt: str | SequenceOf[int],
        params: SamplingParams | None = None,
        adapter: AdapterChoice = None,
        *,
        priority: int = 0,
        stream: bool = False,
        cache_salt: str = "",
        expected_tokens: int | None = None,
    ) -> None:
        """Check a request (`Door.prepare`) and queue it (`submit`). Raises RequestError."""
        self.submit(
            self.door.prepare(
                request_id, prompt, params, adapter, priority=priority, cache_salt=cache_salt,
                expected_tokens=expected_tokens,
            ),
            stream=stream,
        )  # fmt: skip

    def has_work(self) -> bool:
        return bool(self._requests) or bool(self._finished)

    def step(self) -> list[RequestOutput]:
        """Run one step. Returns finished requests, and those that stream and have new tokens.

        Raises EngineError if the step fails; then every request in flight has ended with that error
        and `drain` returns them.
        """
        if not self._requests:
            return self.drain()
        plan: StepPlan | None = None
        started, now = time.perf_counter(), self._clock()
        for request_id, told in self.scheduler.to_abort(now):
            self._requests[request_id].error_kind = DeadlineError.__name__
            self._end([request_id], FinishReason.ERROR, told)
        if not self._requests:
            return self.drain()
        try:
            plan = self.scheduler.plan(now)
            if plan is None and self._flight is None:
                raise EngineError(f"nothing can be scheduled while {len(self._requests)} requests wait")
            if plan is not None:
                self.step_log.planned(plan, now)
            self._advance(plan, now, started)
        except BaseException as error:
            self._flight, self._goes_on = None, False
            self.step_log.failed()
            message = str(error) if isinstance(error, EngineError) else f"a step failed: {error!r}"
            self._end(list(self._requests), FinishReason.ERROR, message)
            if plan is not None:
                # The scheduler takes the plan's adapter loads for done.
                self.scheduler.discard(plan)
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            raise EngineError(message) from error
        outputs = self.drain()
        self._goes_on = bool(self._requests)
        return outputs

    def leave_out(self, seconds: float) -> None:
        """Take time since the last step out of the next one's: that of whoever measures in between."""
        self._landed += seconds

    def drain(self) -> list[RequestOutput]:
        """Outputs that no step has returned yet."""
        outputs, self._finished = self._finished, []
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns what it has so far, or None if it is not in the engine."""
        if request_id not in self._requests:
            return None
        self._end([request_id], FinishReason.ABORT, None)
        return self._finished.pop()

    @property
    def can_work_ahead(self) -> bool:
        """Whether `step` may return while the device still works."""
        return self._ahead is not None

    @property
    def is_ahead(self) -> bool:
        """Whether a step is on its way whose tokens have not been taken in."""
        return self._flight is not None

    def live(self) -> Iterable[Progress]:
        """Requests in the engine, in the order they came; to be looked at only."""
        return self._requests.values()

    def stats(self) -> EngineStats:
        return EngineStats(
            times=replace(self.times),
            scheduler=self.scheduler.stats(),
            num_requests=self._num_submitted,
            num_finished_requests=self._num_finished,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            deadlines=replace(self.deadline_counts),
            costs=self.step_log.cost_stats(self.costs),
        )

    def _advance(self, plan: StepPlan | None, now: float, started: float) -> None:
        """Start a plan, take in the step before it, and then its own tokens where they are known.

        On an executor that samples by itself the plan's commit leaves its tokens PENDING; they come with
        the next call, which has the device's next step planned and started before it waits.
        """
        times, clock = self.times, time.perf_counter
        planned = clock()
        times.plan_s += planned - started
        flight = None if plan is None else self._start(plan, now)
        if flight is not None:
            self._expect(flight, started)
        times.forward_s += clock() - planned
        before, self._flight = self._flight, None
        if before is not None:
            self._land(before)
        if flight is None:
            return
        times.num_steps += 1
        times.num_tokens += flight.plan.num_tokens
        if flight.launch is None:
            self._sample(flight)
            self._measured(flight, clock())
        else:
            committing = clock()
            flight.positions = [len(completion.seq.tokens) for completion in flight.picked]
            flight.ended = self._commit(flight, [PENDING] * len(flight.picked))
            for seq in flight.ended:
                # Who is admitted next may need what they hold of the executor.
                self.executor.release(seq)
            times.commit_s += clock() - committing
            self._flight = flight

    def _start(self, plan: StepPlan, now: float) -> Flight:
        """Hand a plan to the executor."""
        for seq in plan.preempted:
            self.executor.release(seq)
        adapters = self._adapters(plan)
        picked, rows = self._rows_to_sample(plan, now)
        flight = Flight(plan, picked, rows)
        ahead = self._ahead
        if ahead is not None:
            states = [completion.sampling for completion in picked]
            is_scored = any(chunk.logits is LogitRows.ALL for chunk in plan.chunks)
            if not is_scored and all(ahead.can_sample(state) for state in states):
                flight.launch = ahead.launch(plan, adapters, rows, states)
                return flight
        flight.logits = self.executor.forward(plan, adapters)
        return flight

    def _expect(self, flight: Flight, started: float) -> None:
        """Note what a step is expected to take; on a device that works ahead, while it runs."""
        is_after = self._goes_on and flight.launch is None
        flight.started, costs = self._landed if is_after else started, self.costs
        flight.shape = shape_of(flight.plan, self.executor.pool.page_size)
        flight.predicted_s = costs.predict(flight.shape) if costs.is_ready else None

    def _measured(self, flight: Flight, ended: float) -> None:
        """A step is over: it had the device from the end of the one before, or from its own planning, on."""
        duration_s = ended - max(flight.started, self._landed)
        self._landed = ended
        self.step_log.stepped(duration_s, flight.predicted_s)
        self.costs.observe(flight.shape, duration_s)

    def _sample(self, flight: Flight) -> None:
        """Choose a step's tokens from its logits and take them in."""
        times, clock = self.times, time.perf_counter
        started, logits = clock(), flight.logits
        assert logits is not None
        # What the step before ended was planned once more before that was known.
        live = [i for i, c in enumerate(flight.picked) if c.seq.status is SequenceStatus.RUNNING]
        rows, picked = [flight.rows[i] for i in live], [flight.picked[i] for i in live]
        flight.rows, flight.picked = rows, picked
        chosen = logits if len(rows) == len(logits) else logits[rows]
        sampled = self._sampler.sample(chosen, [completion.sampling for completion in picked])
        done = clock()
        ended = self._fail_rows(picked, sampled)
        ended += self._commit(flight, sampled.tokens)
        committed = clock()
        for row, entry in sampled.logprobs.items():
            picked[row].add_logprobs(entry)
        if len(rows) != len(logits):
            self._score_prompts(flight.plan, logits)
        self._num_output_tokens += len(picked) - len(sampled.errors)
        self._emit(picked, ended)
        times.sample_s += done - started
        times.commit_s += committed - done
        times.output_s += clock() - committed

    def _land(self, flight: Flight) -> None:
        """Wait for a launched step and put its tokens where its commit left them out."""
        times, clock = self.times, time.perf_counter
        started = clock()
        assert flight.launch is not None
        sampled = flight.launch.sampled()
        landed = clock()
        self._measured(flight, landed)
        live = [i for i, completion in enumerate(flight.picked) if completion.seq in self._live]
        ended = [seq for seq in flight.ended if seq in self._live]
        picked = [flight.picked[i] for i in live]
        for i in live:
            completion = flight.picked[i]
            message = sampled.errors.get(i)
            if message is not None:
                completion.progress.error = message
                del completion.seq.tokens[flight.positions[i] :]
                was_live = completion.seq.status is not SequenceStatus.FINISHED
                self.scheduler.finish(completion.seq, FinishReason.ERROR)
                ended += [completion.seq] if was_live else []
            elif self.scheduler.settle(completion.seq, flight.positions[i], sampled.tokens[i]):
                ended.append(completion.seq)
        self._num_output_tokens += len(picked) - len(sampled.errors)
        settled = clock()
        self._emit(picked, ended)
        times.forward_s += landed - started
        times.commit_s += settled - landed
        times.output_s += clock() - settled

    def _commit(self, flight: Flight, tokens: SequenceOf[int]) -> list[Sequence]:
        found = {c.seq: (token,) for c, token in zip(flight.picked, tokens, strict=True)}
        result = StepResult(tuple(found.get(chunk.seq, ()) for chunk in flight.plan.chunks))
        return self.scheduler.commit(flight.plan, result)

    def _fail_rows(self, picked: list[Completion], sampled: Sampled) -> list[Sequence]:
        """End the sequences that the sampler refuses, before the commit can cache their KV."""
        for row, message in sampled.errors.items():
            picked[row].progress.error = message
            self.scheduler.finish(picked[row].seq, FinishReason.ERROR)
        return [picked[row].seq for row in sampled.errors]

    def _adapters(self, plan: StepPlan) -> dict[str, AdapterWeights]:
        """Host weights of the plan's adapters by digest."""
        digests = [load.adapter.digest for load in plan.loads] + list(plan.resident)
        if digests and self.store is None:
            raise EngineError("the plan has adapters, but the engine has none")
        return {digest: self.store.weights(digest) for digest in digests} if self.store else {}

    def _rows_to_sample(self, plan: StepPlan, now: float) -> tuple[list[Completion], list[int]]:
        """Completions that get a token in this step, and their rows of the logits."""
        picked: list[Completion] = []
        rows: list[int] = []
        num_rows = 0
        for chunk in plan.chunks:
            completion = self._live[chunk.seq]
            progress = completion.progress
            if progress.first_scheduled_s is None:
                progress.first_scheduled_s = now
            if chunk.logits is LogitRows.NONE:
                continue
            num_rows += 1 if chunk.logits is LogitRows.LAST else chunk.n_new
            if chunk.logits is LogitRows.LAST or chunk.start + chunk.n_new == len(chunk.seq.tokens):
                picked.append(completion)
                rows.append(num_rows - 1)
        return picked, rows

    def _score_prompts(self, plan: StepPlan, logits: torch.Tensor) -> None:
        """Log-probabilities of prompt tokens from chunks that have logits at every position."""
        row = 0
        for chunk in plan.chunks:
            if chunk.logits is LogitRows.LAST:
                row += 1
            elif chunk.logits is LogitRows.ALL:
                score_prompt(self._live[chunk.seq].progress, chunk, logits[row : row + chunk.n_new])
                row += chunk.n_new

    def _emit(self, picked: list[Completion], ended: list[Sequence]) -> None:
        """Bring texts up to date where they are watched, end what ended, collect outputs."""
        now = self._clock()
        streamed: dict[Progress, None] = {}
        for completion in picked:
            progress = completion.progress
            if progress.first_token_s is None:
                progress.first_token_s = now
            if not completion.is_watched:
                continue
            hit = completion.push_new_tokens()
            if hit is not None:
                completion.stop_at(hit)
                if completion.seq.status is not SequenceStatus.FINISHED:
                    self.scheduler.finish(completion.seq, FinishReason.STOP, hit)
                    ended.append(completion.seq)
            if progress.is_streamed:
                streamed[progress] = None
        for seq in ended:
            completion = self._live.pop(seq)
            completion.end(seq.finish_reason, seq.stop_reason)
            self.executor.release(seq)
            completion.progress.num_live -= 1
            if not completion.progress.num_live:
                streamed.pop(completion.progress, None)
                self._retire(completion.progress)
        self._finished += [progress.output(self.tokenizer) for progress in streamed]

    def _end(self, request_ids: list[str], reason: FinishReason, error: str | None) -> None:
        """End requests wherever they are; their outputs come first, should the scheduler fail as well."""
        for request_id in request_ids:
            progress = self._requests[request_id]
            progress.error = error
            for completion in progress.completions:
                if self._live.pop(completion.seq, None) is not None:
                    if completion.seq.tokens[-1] == PENDING:
                        completion.seq.tokens.pop()
                    completion.end(reason, None)
                    self.executor.release(completion.seq)
            progress.num_live = 0
            self._retire(progress)
        for request_id in request_ids:
            self.scheduler.abort(request_id)

    def _retire(self, progress: Progress) -> None:
        progress.finished_s = self._clock()
        self.step_log.finished(progress)
        request = progress.request
        del self._requests[request.request_id]
        self._num_finished += 1
        self.deadline_counts.add(progress.attainment())
        if request.adapter is not None and self.store is not None:
            self.store.release(request.adapter.digest)
        self._finished.append(progress.output(self.tokenizer))
