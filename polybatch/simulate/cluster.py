"""The event loop: a trace over one engine or many, behind a router, colocated or disaggregated.

    arrival, departure, step end, transfer end, in order of time -> outcomes of all requests

All events of one moment are taken in before any engine plans its next step, so that requests that arrive
together can be batched together. Ties are settled by the order in which events were made: runs repeat
exactly.
"""

from __future__ import annotations

import enum
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from polybatch.errors import ConfigError, EngineError
from polybatch.request import FinishReason
from polybatch.simulate.disaggregation import DecodeReplica, PrefillReplica
from polybatch.simulate.engine import EngineSettings, Outcome, Replica
from polybatch.simulate.machines import Machine
from polybatch.simulate.routers import Router, router_named
from polybatch.simulate.traces import Trace


class Kind(enum.IntEnum):
    """What happens at an event."""

    ARRIVAL = 0
    DEPARTURE = 1
    TRANSFER_END = 2
    STEP_END = 3


@dataclass(frozen=True, slots=True)
class Run:
    """A finished simulation. outcomes: in the trace's order. wall_s: simulated time until the last event."""

    trace: Trace
    outcomes: tuple[Outcome, ...]
    replicas: tuple[Replica, ...]
    wall_s: float

    @property
    def num_steps(self) -> int:
        return sum(replica.num_steps for replica in self.replicas)


Event = tuple[float, int, Kind, "Outcome | Replica", Replica | None]


class Cluster:
    """Engines behind a router, and behind a second one for decoding where the two phases are apart."""

    def __init__(
        self, trace: Trace, front: Sequence[Replica], back: Sequence[DecodeReplica], router: str
    ) -> None:
        """front: engines that requests are sent to. back: those that go on decoding; empty if colocated."""
        self._trace = trace
        self._front, self._back = front, back
        self.route: Router = router_named(router, front)
        self.route_back: Router | None = router_named("least-work", back) if back else None
        self._events: list[Event] = []
        self._num_events = 0
        self._outcomes = [Outcome(request, number) for number, request in enumerate(trace.requests)]
        self._ready: dict[Replica, None] = {}
        self._successors: dict[str, list[Outcome]] = {}
        self._num_before: dict[int, int] = {}

    def run(self) -> Run:
        """Run until every request has ended."""
        self._announce()
        events, ready = self._events, self._ready
        now = 0.0
        while events:
            now = events[0][0]
            while events and events[0][0] == now:
                _, _, kind, subject, other = heappop(events)
                if kind is Kind.STEP_END:
                    assert isinstance(subject, Replica)
                    self._step_end(subject, now)
                else:
                    assert isinstance(subject, Outcome)
                    self._happen(kind, subject, other, now)
            for replica in list(ready):
                if isinstance(replica, DecodeReplica):
                    replica.fetch(now, self._on_its_way)
                if not replica.is_busy:
                    self._begin(replica, now)
            ready.clear()
        left = [o.request.request_id for o in self._outcomes if o.reason is None]
        if left:
            raise EngineError(f"{len(left)} requests never ended, the first is {left[0]!r}")
        return Run(self._trace, tuple(self._outcomes), (*self._front, *self._back), now)

    def _begin(self, replica: Replica, now: float) -> None:
        for outcome in replica.drop(now):
            self._over(outcome, now)
        end = replica.begin(now)
        if end is not None:
            self._push(end, Kind.STEP_END, replica)

    def _announce(self) -> None:
        by_id = {outcome.request.request_id: outcome for outcome in self._outcomes}
        for outcome in self._outcomes:
            request = outcome.request
            for before in request.after:
                if before not in by_id:
                    raise ConfigError(
                        f"request {request.request_id!r} comes after {before!r}, which is not in trace "
                        f"{self._trace.name}: name one that is"
                    )
                self._successors.setdefault(before, []).append(outcome)
            if request.after:
                self._num_before[outcome.number] = len(request.after)
            else:
                self._events.append((request.arrival_s, self._num_events, Kind.ARRIVAL, outcome, None))
                self._num_events += 1
        heapify(self._events)

    def _push(self, at: float, kind: Kind, subject: Outcome | Replica, other: Replica | None = None) -> None:
        self._num_events += 1
        heappush(self._events, (at, self._num_events, kind, subject, other))

    def _happen(self, kind: Kind, outcome: Outcome, other: Replica | None, now: float) -> None:
        if kind is Kind.ARRIVAL:
            self._arrive(outcome, now)
        elif kind is Kind.DEPARTURE:
            replica = (*self._front, *self._back)[outcome.replica]
            if not outcome.token_times and replica.cancel(outcome, now):
                outcome.reason, outcome.finished_s = FinishReason.ABORT, now
                self._over(outcome, now)
                self._ready[replica] = None
        else:
            assert isinstance(other, PrefillReplica)
            target = (*self._front, *self._back)[outcome.replica]
            assert isinstance(target, DecodeReplica)
            other.fetched(outcome, now)
            if not target.arrived(outcome, now):
                self._over(outcome, now)
            self._ready[other] = self._ready[target] = None

    def _arrive(self, outcome: Outcome, now: float) -> None:
        outcome.sent_s = now
        replica = self._front[self.route.choose(outcome, now)]
        if not replica.submit(outcome, now):
            self._over(outcome, now)
        if outcome.request.patience_s is not None:
            self._push(now + outcome.request.patience_s, Kind.DEPARTURE, outcome)
        self._ready[replica] = None

    def _step_end(self, replica: Replica, now: float) -> None:
        for outcome in replica.end(now):
            if isinstance(replica, PrefillReplica) and not outcome.is_complete:
                self._hand_over(outcome, replica, now)
            else:
                if isinstance(replica, PrefillReplica):
                    replica.fetched(outcome, now)
                self._over(outcome, now)
        self._ready[replica] = None

    def _hand_over(self, outcome: Outcome, source: Replica, now: float) -> None:
        outcome.reason = outcome.finished_s = None
        assert self.route_back is not None
        target = self._back[self.route_back.choose(outcome, now)]
        target.offer(outcome, source)
        self._ready[target] = None

    def _on_its_way(self, at: float, outcome: Outcome, source: Replica) -> None:
        self._push(at, Kind.TRANSFER_END, outcome, source)

    def _over(self, outcome: Outcome, now: float) -> None:
        """Tell the routers, and send what waited for this request; without its output nothing can follow."""
        self.route.ended(outcome)
        if self.route_back is not None and outcome.replica >= len(self._front):
            self.route_back.ended(outcome)
        for successor in self._successors.get(outcome.request.request_id, ()):
            self._num_before[successor.number] -= 1
            if not outcome.is_complete:
                self._give_up(successor, now)
            elif self._num_before[successor.number] == 0 and successor.reason is None:
                self._push(max(now, successor.request.arrival_s), Kind.ARRIVAL, successor)

    def _give_up(self, outcome: Outcome, now: float) -> None:
        """End a request that will never be sent, and all that would have followed it."""
        if outcome.reason is not None:
            return
        outcome.reason, outcome.finished_s = FinishReason.ABORT, now
        outcome.error = "a request that it needs did not complete"
        for successor in self._successors.get(outcome.request.request_id, ()):
            self._give_up(successor, now)


def simulate(
    trace: Trace,
    machines: Machine | Sequence[Machine],
    settings: EngineSettings | None = None,
    *,
    router: str = "round-robin",
    num_prefill: int = 0,
) -> Run:
    """Run a trace over an engine per machine.

    num_prefill: 0 colocates both phases; else the first so many machines only prefill and the others decode.
    """
    settings = settings or EngineSettings()
    machines = [machines] if isinstance(machines, Machine) else list(machines)
    if not machines or not 0 <= num_prefill < len(machines):
        raise ConfigError(
            f"num_prefill is {num_prefill} and there are {len(machines)} machines; both phases need at least "
            "one: give more machines"
        )
    back: list[DecodeReplica] = []
    front: list[Replica]
    if num_prefill:
        front = [PrefillReplica(m, settings, trace.adapters, i) for i, m in enumerate(machines[:num_prefill])]
        back = [
            DecodeReplica(m, settings, trace.adapters, i)
            for i, m in enumerate(machines[num_prefill:], num_prefill)
        ]
    else:
        front = [Replica(m, settings, trace.adapters, i) for i, m in enumerate(machines)]
    # Plans are many small objects without cycles: collecting them costs a third of the time and frees
    # nothing.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return Cluster(trace, front, back, router).run()
    finally:
        if was_enabled:
            gc.enable()
