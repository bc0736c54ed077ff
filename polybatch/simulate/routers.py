"""Routers: which of several engines serves a request. No torch.

A router sees what a real one could see: the requests that it gave out and which of them have ended, the
prompts' beginnings and adapters, and what each machine is known to need for a request. True output lengths
it does not see; it goes by `expected_tokens`, or by max_tokens, or by a guess.
Sources: HexGen-Text2SQL for `hexgen`; consistent placement with bounded loads (Mirrokni et al. 2018) for the
limit on affinity.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from polybatch.errors import ConfigError
from polybatch.simulate.engine import Outcome, Replica
from polybatch.simulate.traces import TraceRequest

GUESSED_TOKENS = 128
"""Of output, where neither an estimate nor a limit is known."""

BOUND = 1.25
"""How far above the mean a replica's outstanding work may be before affinity gives way."""


def expected_output(request: TraceRequest) -> int:
    return request.expected_tokens or request.max_tokens or GUESSED_TOKENS


class Router(Protocol):
    """Chooses a replica by its place in the list."""

    def choose(self, outcome: Outcome, now: float) -> int: ...

    def ended(self, outcome: Outcome) -> None:
        """A request that `choose` placed is over."""
        ...


class RoundRobin:
    """Each in turn."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._num, self._next = len(replicas), 0

    def choose(self, outcome: Outcome, now: float) -> int:
        chosen = self._next
        self._next = (chosen + 1) % self._num
        return chosen

    def ended(self, outcome: Outcome) -> None:
        """Its order does not depend on what is over."""


class LeastWork:
    """The replica whose outstanding requests, this one included, take its machine the shortest time."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self.work = [0.0] * len(replicas)
        """Estimated seconds of outstanding requests, per replica."""
        self._placed: dict[int, tuple[int, float]] = {}

    def estimate(self, request: TraceRequest, index: int) -> float:
        """Seconds that a request takes alone on a replica's machine."""
        return self._replicas[index].machine.request_s(request.num_input, expected_output(request))

    def choose(self, outcome: Outcome, now: float) -> int:
        costs = [self.estimate(outcome.request, i) for i in range(len(self._replicas))]
        return self.place(outcome, self.preferred(outcome, costs), costs)

    def preferred(self, outcome: Outcome, costs: list[float]) -> int:
        return min(range(len(costs)), key=lambda i: self.work[i] + costs[i])

    def place(self, outcome: Outcome, chosen: int, costs: list[float]) -> int:
        self.work[chosen] += costs[chosen]
        self._placed[outcome.number] = (chosen, costs[chosen])
        return chosen

    def ended(self, outcome: Outcome) -> None:
        chosen, cost = self._placed.pop(outcome.number)
        self.work[chosen] -= cost

    def is_overloaded(self, index: int, costs: list[float]) -> bool:
        """Whether affinity to this replica would cost more than it gains."""
        mean = (sum(self.work) + costs[index]) / len(self.work)
        return self.work[index] > BOUND * mean + costs[index]


class HexGen(LeastWork):
    """Fast machines first, but not where work has piled up: argmax of a T_ref/T_e - (1 - a) W_e/W_ref.

    T: estimated time of this request, W: outstanding work; ref: the first replica, used at once when idle.
    Source: HexGen-Text2SQL, dispatcher; W is outstanding work, which its released simulator only
    approximates.
    """

    alpha = 0.5

    def preferred(self, outcome: Outcome, costs: list[float]) -> int:
        reference = self.work[0]
        if reference <= 0:
            return 0
        alpha = self.alpha
        return max(
            range(len(costs)),
            key=lambda i: alpha * costs[0] / costs[i] - (1 - alpha) * self.work[i] / reference,
        )


class PrefixAffinity(LeastWork):
    """The replica that was given the longest beginning of this prompt before, unless it is overloaded."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        super().__init__(replicas)
        self._seen: list[set[int]] = [set() for _ in replicas]

    def preferred(self, outcome: Outcome, costs: list[float]) -> int:
        blocks = outcome.request.blocks
        depths = [self._depth(seen, blocks) for seen in self._seen]
        best = max(range(len(depths)), key=lambda i: (depths[i], -self.work[i]))
        chosen = best
        if depths[best] == 0 or self.is_overloaded(best, costs):
            chosen = super().preferred(outcome, costs)
        self._seen[chosen].update(blocks)
        return chosen

    @staticmethod
    def _depth(seen: set[int], blocks: tuple[int, ...]) -> int:
        for depth, block in enumerate(blocks):
            if block not in seen:
                return depth
        return len(blocks)


class AdapterAffinity(LeastWork):
    """Each adapter has a home among the replicas (rendezvous hashing), which gives way when overloaded."""

    def preferred(self, outcome: Outcome, costs: list[float]) -> int:
        adapter = outcome.request.adapter
        if adapter is not None:
            homes = sorted(
                range(len(costs)), key=lambda i: zlib.crc32(f"{adapter}/{i}".encode()), reverse=True
            )
            for home in homes[:2]:
                if not self.is_overloaded(home, costs):
                    return home
        return super().preferred(outcome, costs)


ROUTERS: dict[str, Callable[[Sequence[Replica]], Router]] = {
    "round-robin": RoundRobin,
    "least-work": LeastWork,
    "hexgen": HexGen,
    "prefix-affinity": PrefixAffinity,
    "adapter-affinity": AdapterAffinity,
}


def router_named(name: str, replicas: Sequence[Replica]) -> Router:
    """A new router over these replicas. Raises ConfigError for an unknown name."""
    if name not in ROUTERS:
        raise ConfigError(f"router is {name!r}; it must be one of {', '.join(ROUTERS)}")
    return ROUTERS[name](replicas)
