"""What steps held and how requests fared, for people who watch.

Two bounded rings: a `StepRecord` per step, and a `RequestTrace` per finished request. Both are written as
things happen, with a few dictionary operations per chunk, and read only when somebody asks
(`engine.snapshot`). It follows the engine and never steers it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict

import msgspec
from msgspec.structs import replace

from polybatch.engine.outputs import Progress
from polybatch.engine.stats import CostStats
from polybatch.request import SequenceStatus
from polybatch.scheduling.cost_fit import quantile
from polybatch.scheduling.online_cost import OnlineCost
from polybatch.scheduling.plan import StepPlan

MAX_STEPS = 256
MAX_FINISHED = 64


class StepRecord(msgspec.Struct, array_like=True, frozen=True):
    """What one step held.

    index: from 0 since the engine's start. started_s: on the engine's clock.
    duration_s: to its tokens from the end of the step before, or, after a rest, from its planning; whatever
        the engine does between two steps counts. predicted_s: what was expected of that, None where nothing
        was.
    num_seqs: chunks. decode: newest tokens of sequences that decode, by adapter, "" for none.
    prefill: tokens of prompts, and of what is computed again after a preemption, by adapter.
    """

    index: int
    started_s: float
    duration_s: float
    predicted_s: float | None
    num_seqs: int
    num_loads: int
    num_preempted: int
    decode: dict[str, int]
    prefill: dict[str, int]


class RequestTrace(msgspec.Struct, array_like=True, frozen=True):
    """How one request fared; times in seconds on the engine's clock, None where it has not got there.

    status: "waiting", "running", or the reason why its first completion ended.
    adapter_load_s: beginning of the step that brought its adapter into the pool, if it was not there before.
    num_cached: prompt tokens found in the prefix cache. num_chunks: prefill chunks, all completions together,
        num_output: their tokens.
    first_due_s, last_due_s: when its first and its last token are due. predicted_ttft_s, predicted_e2e_s:
        what it was told at its arrival, in seconds from then. missed, kept: kinds of deadlines, at its end.
    """

    request_id: str
    tenant: str
    adapter: str | None
    status: str
    num_prompt: int
    num_cached: int
    num_chunks: int
    num_output: int
    num_preemptions: int
    arrival_s: float
    adapter_load_s: float | None
    first_scheduled_s: float | None
    first_token_s: float | None
    finished_s: float | None
    first_due_s: float | None = None
    last_due_s: float | None = None
    predicted_ttft_s: float | None = None
    predicted_e2e_s: float | None = None
    missed: list[str] = []
    kept: list[str] = []


class _Notes:
    """What only the log knows of a live request."""

    __slots__ = ("adapter_load_s", "num_chunks")

    def __init__(self) -> None:
        self.num_chunks = 0
        self.adapter_load_s: float | None = None


class StepLog:
    """The rings, and notes on live requests. is_resident: whether the pool holds an adapter's digest."""

    def __init__(
        self,
        is_resident: Callable[[str], bool],
        max_steps: int = MAX_STEPS,
        max_finished: int = MAX_FINISHED,
    ) -> None:
        self._is_resident = is_resident
        self._steps: deque[StepRecord] = deque(maxlen=max_steps)
        self._finished: deque[RequestTrace] = deque(maxlen=max_finished)
        self._notes: dict[str, _Notes] = {}
        self._wanted: dict[str, dict[str, _Notes]] = {}
        """Adapter that is being waited for -> the requests that do."""
        self._drafts: deque[StepRecord] = deque()
        """Of steps that are not over: two for a moment where the device works ahead."""
        self._num_planned = 0
        self._num_predicted = 0
        self._predicted_s = self._measured_s = 0.0

    def submitted(self, progress: Progress) -> None:
        request = progress.request
        notes = self._notes[request.request_id] = _Notes()
        if request.adapter is not None and not self._is_resident(request.adapter.digest):
            self._wanted.setdefault(request.adapter.digest, {})[request.request_id] = notes

    def planned(self, plan: StepPlan, now: float) -> None:
        """Count what a step holds, before it runs: some of its requests may end with it."""
        decode: dict[str, int] = {}
        prefill: dict[str, int] = {}
        for chunk in plan.chunks:
            seq, n_new = chunk.seq, chunk.n_new
            adapter = seq.adapter
            name = "" if adapter is None else adapter.name
            if n_new == 1 and chunk.start >= seq.num_prompt:
                decode[name] = decode.get(name, 0) + 1
                continue
            prefill[name] = prefill.get(name, 0) + n_new
            self._notes[seq.request.request_id].num_chunks += 1
        for load in plan.loads:
            for notes in self._wanted.pop(load.adapter.digest, {}).values():
                notes.adapter_load_s = now
        self._drafts.append(StepRecord(
            self._num_planned, now, 0.0, None,
            len(plan.chunks), len(plan.loads), len(plan.preempted), decode, prefill,
        ))  # fmt: skip
        self._num_planned += 1

    def stepped(self, duration_s: float, predicted_s: float | None = None) -> None:
        """Keep what was counted of the step that is now over: the oldest that was planned and is not."""
        draft = self._drafts.popleft()
        if predicted_s is not None:
            self._num_predicted += 1
            self._predicted_s += predicted_s
            self._measured_s += duration_s
        self._steps.append(replace(draft, duration_s=duration_s, predicted_s=predicted_s))

    def failed(self) -> None:
        """Forget the steps that were planned and will never be over."""
        self._num_planned -= len(self._drafts)
        self._drafts.clear()

    def prediction_errors(self) -> list[float]:
        """|predicted - measured| / measured of the steps in the ring that were predicted."""
        return [
            abs(step.predicted_s / step.duration_s - 1.0)
            for step in self._steps
            if step.predicted_s is not None and step.duration_s > 0
        ]

    def cost_stats(self, costs: OnlineCost) -> CostStats:
        """How well steps are predicted. costs: what predicts them."""
        errors = self.prediction_errors()
        return CostStats(
            costs.is_calibrated, self._num_predicted, self._predicted_s, self._measured_s,
            quantile(errors, 0.5), quantile(errors, 0.95), dict(costs.factors),
        )  # fmt: skip

    def finished(self, progress: Progress) -> None:
        """Move a request from the live to the finished."""
        request = progress.request
        self._finished.append(self.trace(progress))
        del self._notes[request.request_id]
        if request.adapter is not None:
            waiting = self._wanted.get(request.adapter.digest, {})
            waiting.pop(request.request_id, None)
            if not waiting:
                self._wanted.pop(request.adapter.digest, None)

    def steps_after(self, index: int) -> list[StepRecord]:
        """Records with a greater index, as far back as the ring goes, oldest first."""
        return [record for record in self._steps if record.index > index]

    def traces(self, live: Iterable[Progress]) -> list[RequestTrace]:
        """The finished ones, oldest first, then the given live ones."""
        return [*self._finished, *map(self.trace, live)]

    def trace(self, progress: Progress) -> RequestTrace:
        """How a live request fares."""
        request, notes = progress.request, self._notes[progress.request.request_id]
        seqs = [completion.seq for completion in progress.completions]
        due, answer = progress.deadlines, progress.answer
        outcome = {} if due is None else asdict(progress.attainment())
        return RequestTrace(
            request.request_id,
            request.tenant,
            request.adapter.name if request.adapter else None,
            _status(progress),
            len(request.prompt_token_ids),
            seqs[0].num_cached,
            notes.num_chunks,
            sum(seq.num_output for seq in seqs),
            sum(seq.num_preemptions for seq in seqs),
            request.arrival_s,
            notes.adapter_load_s,
            progress.first_scheduled_s,
            progress.first_token_s,
            progress.finished_s,
            None if due is None or due.ttft_s is None else request.arrival_s + due.ttft_s,
            None if due is None or due.e2e_s is None else request.arrival_s + due.e2e_s,
            None if answer is None else answer.ttft_s,
            None if answer is None else answer.e2e_s,
            [kind for kind, is_kept in outcome.items() if is_kept is False],
            [kind for kind, is_kept in outcome.items() if is_kept],
        )

    @property
    def num_notes(self) -> int:
        """Live requests that the log remembers something of."""
        return len(self._notes)


def _status(progress: Progress) -> str:
    if progress.finished_s is not None:
        reason = progress.completions[0].finish_reason
        return "error" if reason is None else reason.value
    statuses: Collection[SequenceStatus] = {completion.seq.status for completion in progress.completions}
    return "running" if SequenceStatus.RUNNING in statuses else "waiting"


__all__ = ["RequestTrace", "StepLog", "StepRecord"]
