"""One simulated engine: the real scheduler, pool and prefix tree; a cost model in the executor's place.

    submit -> [ begin: plan, predict how long -> end: commit made-up tokens, note the time ]*

Nothing here decides: who runs, who is preempted and what is found in the prefix tree is decided by the very
`Scheduler` that serves. Outputs have the lengths of the trace, which the scheduler learns as it would in
life: by a stop token, or by max_tokens where the client said it.
Not simulated: text, sampling, the time that HTTP and tokenising take. Time is a number; there is no clock.
Source: the same idea as Vidur (Agrawal et al. 2024), with the scheduler itself instead of a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter

from polybatch.config import SchedulerConfig, ServiceLevels
from polybatch.errors import RequestError
from polybatch.request import AdapterRef, FinishReason, Request, SamplingParams, Sequence
from polybatch.scheduling.costs import StepShape, shape_of
from polybatch.scheduling.plan import LogitRows, StepPlan, StepResult
from polybatch.scheduling.scheduler import Scheduler
from polybatch.simulate.machines import Machine
from polybatch.simulate.prompts import STOP_TOKEN, private_token, prompt_tokens
from polybatch.simulate.traces import TraceRequest

_PARAMS = SamplingParams(max_tokens=None)
_STOP_IDS = frozenset((STOP_TOKEN,))
_SEQ = itemgetter(0)


class Outcome:
    """What became of one request; written by the replica that served it.

    number: its place in the trace. sent_s: when it arrived. token_times: when each token was there.
    answer: whether it was told at its arrival that its deadlines will be met; None where it was told nothing.
    reason: None while it lives. error: why it was refused. replica: index of the engine that served it last.
    """

    __slots__ = (
        "answer",
        "error",
        "finished_s",
        "first_scheduled_s",
        "last_tokens",
        "num_cached",
        "num_preemptions",
        "num_target",
        "number",
        "reason",
        "replica",
        "request",
        "sent_s",
        "token_times",
        "tokens",
    )  # fmt: skip

    def __init__(self, request: TraceRequest, number: int) -> None:
        self.request = request
        self.number = number
        self.sent_s = request.arrival_s
        self.first_scheduled_s: float | None = None
        self.finished_s: float | None = None
        self.token_times: list[float] = []
        self.num_cached = 0
        self.num_preemptions = 0
        self.reason: FinishReason | None = None
        self.error: str | None = None
        self.answer: bool | None = None
        self.replica = 0
        # What a step brings it: the same token each time, and the stop token as its last.
        self.num_target = request.num_output
        self.tokens = (private_token(number),)
        self.last_tokens = (STOP_TOKEN,)

    @property
    def is_complete(self) -> bool:
        """Whether it has all its tokens."""
        return len(self.token_times) == self.request.num_output

    @property
    def ttft_s(self) -> float | None:
        return self.token_times[0] - self.sent_s if self.token_times else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None with fewer than two."""
        times = self.token_times
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    @property
    def e2e_s(self) -> float | None:
        return self.finished_s - self.sent_s if self.finished_s is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How every simulated engine is set up; None takes the machine's value.

    max_tokens: what every client asks for; None: what the trace says, or else the true length.
    has_costs: whether the scheduler may ask the cost model, as one that was calibrated does.
    enable_prefix_caching: off saves time where prompts share nothing. batching, service, adapter_cluster,
        stage_times: as in `SchedulerConfig`.
    page_samples: so many samples of page use are kept at most.
    """

    policy: str = "fcfs"
    batching: str = "stall_free"
    service: ServiceLevels = field(default_factory=ServiceLevels)
    adapter_cluster: int | None = None
    stage_times: tuple[tuple[str, float], ...] = ()
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_tokens: int | None = None
    enable_prefix_caching: bool = True
    has_costs: bool = True
    page_samples: int = 1024

    def scheduler_config(self, machine: Machine) -> SchedulerConfig:
        return SchedulerConfig(
            max_num_batched_tokens=self.max_num_batched_tokens or machine.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs or machine.max_num_seqs,
            max_model_len=machine.max_model_len,
            policy=self.policy,
            batching=self.batching,
            service=self.service,
            adapter_cluster=self.adapter_cluster,
            stage_times=self.stage_times,
            enable_prefix_caching=self.enable_prefix_caching,
        )


def default_scheduler(machine: Machine, settings: EngineSettings) -> Scheduler:
    """The scheduler of an engine with these settings."""
    costs = machine.costs if settings.has_costs else None
    return Scheduler(settings.scheduler_config(machine), machine.pool, costs=costs)


@dataclass(slots=True)
class PageUse:
    """Page use over time: every so many steps, thinned out as the run grows longer.

    times: seconds. kv, adapters, cached: pages that running sequences, adapters and idle prefixes hold.
    """

    limit: int
    times: list[float]
    kv: list[int]
    adapters: list[int]
    cached: list[int]
    stride: int = 16

    def note(self, now: float, scheduler: Scheduler) -> None:
        arena = scheduler.arena
        self.times.append(now)
        self.kv.append(arena.num_kv)
        self.adapters.append(arena.adapters.num_pages)
        self.cached.append(arena.pool.num_cached)
        if len(self.times) >= self.limit:
            self.stride *= 2
            for series in (self.times, self.kv, self.adapters, self.cached):
                del series[1::2]


class Replica:
    """One engine on one machine. `begin` and `end` alternate; `submit` and `cancel` may come between."""

    def __init__(
        self,
        machine: Machine,
        settings: EngineSettings,
        adapters: dict[str, int],
        index: int = 0,
        make_scheduler: Callable[[Machine, EngineSettings], Scheduler] = default_scheduler,
    ) -> None:
        """adapters: name -> rank, of all that requests may name."""
        self.machine, self.settings, self.index = machine, settings, index
        self.scheduler = make_scheduler(machine, settings)
        self.adapters = {
            name: AdapterRef(name, name, machine.adapter_pages(rank)) for name, rank in adapters.items()
        }
        self.pages = PageUse(settings.page_samples, [], [], [], [])
        self.num_steps = 0
        self.num_rows = 0
        self.busy_s = 0.0
        self.live: dict[Sequence, Outcome] = {}
        self._sequence_of: dict[int, Sequence] = {}
        self._plan: StepPlan | None = None
        self._duration = 0.0
        self._predict = machine.costs.predict

    @property
    def is_busy(self) -> bool:
        """Whether a step is on its way."""
        return self._plan is not None

    def request_of(self, outcome: Outcome) -> Request:
        """What a client would have sent."""
        source = outcome.request
        max_tokens = self.settings.max_tokens or source.max_tokens or source.num_output
        return Request(
            request_id=source.request_id,
            prompt_token_ids=prompt_tokens(source, outcome.number),
            params=_PARAMS,
            max_tokens=max(max_tokens, source.num_output),
            seed=0,
            stop_token_ids=_STOP_IDS,
            adapter=None if source.adapter is None else self.adapters[source.adapter],
            priority=source.priority,
            arrival_s=outcome.sent_s,
            tenant=source.tenant,
            deadlines=source.deadlines,
            workflow=source.workflow,
            expected_tokens=source.expected_tokens,
        )

    def submit(self, outcome: Outcome, now: float) -> bool:
        """Give a request to the scheduler; False, with the reason noted, if it refuses."""
        return self.accept(outcome, self.request_of(outcome), now)

    def accept(self, outcome: Outcome, request: Request, now: float) -> bool:
        """The same for a request that is made already."""
        outcome.replica = self.index
        try:
            (sequence,) = self.scheduler.add(request, now)
        except RequestError as error:
            outcome.reason, outcome.error, outcome.finished_s = FinishReason.ERROR, str(error), now
            return False
        if request.deadlines is not None:
            answer = self.scheduler.answer(request.request_id)
            outcome.answer = None if answer is None else answer.is_met
        self.live[sequence] = outcome
        self._sequence_of[outcome.number] = sequence
        return True

    def cancel(self, outcome: Outcome, now: float) -> bool:
        """End a request on its client's word; False if it had ended."""
        if outcome.number not in self._sequence_of:
            return False
        self.scheduler.abort(outcome.request.request_id)
        self._close(self._sequence_of[outcome.number], now)
        return True

    def drop(self, now: float) -> list[Outcome]:
        """End the requests that the policy gives up; called before a step is planned."""
        dropped = []
        for request_id, told in self.scheduler.to_abort(now):
            for sequence in self.scheduler.abort(request_id):
                outcome = self._close(sequence, now)
                outcome.error = told
                dropped.append(outcome)
        return dropped

    def begin(self, now: float) -> float | None:
        """Plan a step; returns when it will be done, None where there is nothing to do."""
        plan = self.scheduler.plan(now)
        if plan is None:
            return None
        self._plan = plan
        live = self.live
        for chunk in plan.chunks[plan.num_decodes :]:
            if chunk.n_new > 1 or chunk.start < chunk.seq.num_prompt:
                outcome = live[chunk.seq]
                if outcome.first_scheduled_s is None:
                    outcome.first_scheduled_s = now
                    outcome.num_cached = chunk.seq.num_cached
        self._duration = self._predict(self.shape(plan))
        return now + self._duration

    def shape(self, plan: StepPlan) -> StepShape:
        """What the machine has to do for a plan."""
        return shape_of(plan, self.machine.pool.page_size)

    def end(self, now: float) -> list[Outcome]:
        """Take the step's tokens in; returns the requests that it ended."""
        plan = self._plan
        assert plan is not None, "no step is on its way"
        self._plan = None
        live, none = self.live, LogitRows.NONE
        tokens: list[tuple[int, ...]] = []
        add = tokens.append
        chunks, num_decodes = plan.chunks, plan.num_decodes
        decoding = list(map(live.get, map(_SEQ, chunks[:num_decodes])))
        if None in decoding:  # left while the step ran
            decoding, num_decodes = [], 0
        for outcome in decoding:
            assert outcome is not None
            times = outcome.token_times
            times.append(now)
            add(outcome.last_tokens if len(times) == outcome.num_target else outcome.tokens)
        for seq, _, _, logits in chunks[num_decodes:]:
            outcome = live.get(seq)
            if outcome is None or logits is none:
                add(())
                continue
            times = outcome.token_times
            times.append(now)
            add(outcome.last_tokens if len(times) == outcome.num_target else outcome.tokens)
        finished = self.scheduler.commit(plan, StepResult(tuple(tokens)))
        self.num_steps += 1
        self.num_rows += len(tokens)
        self.busy_s += self._duration
        if self.num_steps % self.pages.stride == 0:
            self.pages.note(now, self.scheduler)
        return [self._close(sequence, now) for sequence in finished] if finished else []

    def _close(self, sequence: Sequence, now: float) -> Outcome:
        outcome = self.live.pop(sequence)
        del self._sequence_of[outcome.number]
        outcome.finished_s = now
        outcome.reason = sequence.finish_reason
        outcome.num_preemptions += sequence.num_preemptions
        return outcome
