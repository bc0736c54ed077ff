"""Prefill on some engines, decoding on others, and the KV that goes from one to the other. No torch.

A request is prefilled as if its output were one token. Its KV then stays where it is until a decoding engine
has room and fetches it (pull), so that the prefill engine's memory is the queue between the two. Transfers
into one engine follow each other at the slower of the two links.

The real schedulers do both halves. What they are not told, a gate in front of them keeps: on the prefill side
that finished prompts still hold pages, on the decode side that a transfer on its way has claimed some. A
prompt that arrives with its KV is planned as one chunk and charged as one decoding row, since only its last
token is computed; after a preemption it is computed in full, and charged so.
Source: DistServe (Zhong et al. 2024), section 4.3.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from polybatch.config import SchedulerConfig
from polybatch.request import Request
from polybatch.scheduling.costs import StepShape, shape_of
from polybatch.scheduling.plan import Chunk, StepPlan
from polybatch.scheduling.scheduler import Scheduler
from polybatch.simulate.engine import EngineSettings, Outcome, Replica
from polybatch.simulate.machines import Machine
from polybatch.simulate.prompts import prompt_tokens

_UNLIMITED = 1 << 40


class PrefillReplica(Replica):
    """Computes prompts and their first tokens; keeps their KV until it is fetched."""

    def __init__(
        self, machine: Machine, settings: EngineSettings, adapters: dict[str, int], index: int = 0
    ) -> None:
        super().__init__(machine, settings, adapters, index)
        self._gate: deque[Outcome] = deque()
        self._held: dict[int, int] = {}
        self._num_claimed = 0

    def request_of(self, outcome: Outcome) -> Request:
        return replace(super().request_of(outcome), max_tokens=1)

    def submit(self, outcome: Outcome, now: float) -> bool:
        outcome.replica = self.index
        self._gate.append(outcome)
        return self._admit(now)

    def fetched(self, outcome: Outcome, now: float) -> None:
        """A decoding engine has the KV of this request: its pages are free."""
        self._num_claimed -= self._held.pop(outcome.number)
        self._admit(now)

    def cancel(self, outcome: Outcome, now: float) -> bool:
        is_live = super().cancel(outcome, now)
        if is_live:
            self.fetched(outcome, now)
        elif outcome in self._gate:
            self._gate.remove(outcome)
            is_live = True
        return is_live

    def _admit(self, now: float) -> bool:
        """Let in who fits beside all prompts that are computed or wait to be fetched."""
        is_accepted = True
        while self._gate:
            outcome = self._gate[0]
            need = self.scheduler.arena.pages_for(outcome.request.num_input)
            if self._num_claimed and self._num_claimed + need > self.machine.pool.num_pages:
                break
            self._gate.popleft()
            if super().submit(outcome, now):
                self._held[outcome.number] = need
                self._num_claimed += need
            else:
                is_accepted = False
        return is_accepted


def decode_scheduler(machine: Machine, settings: EngineSettings) -> Scheduler:
    """A scheduler that takes a prompt whose KV arrives in one chunk, however long."""
    config: SchedulerConfig = replace(
        settings.scheduler_config(machine), max_num_batched_tokens=_UNLIMITED, enable_prefix_caching=False
    )
    return Scheduler(config, machine.pool, costs=machine.costs if settings.has_costs else None)


class DecodeReplica(Replica):
    """Fetches the KV of computed prompts when it has room, and goes on from there."""

    def __init__(
        self, machine: Machine, settings: EngineSettings, adapters: dict[str, int], index: int = 0
    ) -> None:
        super().__init__(machine, settings, adapters, index, decode_scheduler)
        self._ready: deque[tuple[Outcome, Replica]] = deque()
        self._num_reserved = 0
        self._num_coming = 0
        self._link_free_s = 0.0
        self.transfer_s = 0.0
        """Time that its link was busy."""

    @property
    def num_waiting(self) -> int:
        """Requests that are computed elsewhere and not fetched yet."""
        return len(self._ready)

    def offer(self, outcome: Outcome, source: Replica) -> None:
        """A prompt is computed and can be fetched from `source`."""
        outcome.replica = self.index
        self._ready.append((outcome, source))

    def fetch(self, now: float, on_its_way: Callable[[float, Outcome, Replica], None]) -> None:
        """Start the transfers that there is room for; each is announced with the time of its end."""
        arena = self.scheduler.arena
        limit = self.settings.max_num_seqs or self.machine.max_num_seqs
        while self._ready:
            outcome, source = self._ready[0]
            need = arena.pages_for(outcome.request.num_input + 1)
            is_idle = not self.live and not self._num_coming
            room = arena.num_available - self._num_reserved - arena.pool.num_pages // 100
            if not is_idle and (need > room or len(self.live) + self._num_coming >= limit):
                return
            self._ready.popleft()
            self._num_reserved += need
            self._num_coming += 1
            speed = min(self.machine.link_bytes_per_s, source.machine.link_bytes_per_s)
            duration = outcome.request.num_input * self.machine.kv_bytes_per_token / speed
            self._link_free_s = max(now, self._link_free_s) + duration
            self.transfer_s += duration
            on_its_way(self._link_free_s, outcome, source)

    def arrived(self, outcome: Outcome, now: float) -> bool:
        """Its KV is here: hand it to the scheduler; False if it is refused."""
        self._num_reserved -= self.scheduler.arena.pages_for(outcome.request.num_input + 1)
        self._num_coming -= 1
        request = super().request_of(outcome)
        whole = prompt_tokens(outcome.request, outcome.number)
        return self.accept(
            outcome,
            replace(request, prompt_token_ids=(*whole, *outcome.tokens), max_tokens=request.max_tokens - 1),
            now,
        )

    def shape(self, plan: StepPlan) -> StepShape:
        """As planned, but for prompts whose KV has come: one row each."""
        chunks = [
            Chunk(c.seq, c.start + c.n_new - 1, 1, c.logits)
            if c.n_new > 1 and c.start == 0 and c.seq.num_preemptions == 0
            else c
            for c in plan.chunks
        ]
        return shape_of(replace(plan, chunks=tuple(chunks)), self.machine.pool.page_size)
