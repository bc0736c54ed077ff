"""What arrives when: requests by their lengths, prefixes and adapters, with no text. No torch.

A `TraceRequest` knows the true length of its output; the scheduler is only told what a client would say.
Prompts share what their `blocks` share: equal ids in equal places are equal tokens. A request without blocks
shares nothing with anyone.

Readers for public traces are in `readers.py`, generators under `workloads/`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from polybatch.errors import ConfigError
from polybatch.request import Deadlines, WorkflowStage


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request as it is known afterwards. Lengths in tokens, times in seconds.

    arrival_s: from the trace's beginning; with `after`, the earliest time that it may be sent.
    num_output: true length of the output. max_tokens: what the client allowed; None where it is not known.
    blocks: ids of the prompt's blocks, each `block_tokens` long but for the last; () shares nothing.
    adapter: one of the trace's adapters. expected_tokens: an estimate of the output given with the request.
    deadlines, workflow, priority, tenant: as in `polybatch.request.Request`.
    after: ids of requests that must have ended before this one is sent. patience_s: the client leaves when it
        has waited so long for its first token.
    """

    request_id: str
    arrival_s: float
    num_input: int
    num_output: int
    max_tokens: int | None = None
    blocks: tuple[int, ...] = ()
    block_tokens: int = 512
    adapter: str | None = None
    expected_tokens: int | None = None
    deadlines: Deadlines | None = None
    workflow: WorkflowStage | None = None
    priority: int = 0
    tenant: str = ""
    after: tuple[str, ...] = ()
    patience_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_input", "num_output", "block_tokens"):
            if getattr(self, name) < 1:
                self._refuse(name, "at least 1")
        if not 0 <= self.arrival_s < float("inf"):
            self._refuse("arrival_s", "0 or a positive number of seconds")
        num_blocks = -(-self.num_input // self.block_tokens)
        if self.blocks and len(self.blocks) != num_blocks:
            raise ConfigError(
                f"request {self.request_id!r} has {len(self.blocks)} blocks of {self.block_tokens} tokens "
                f"for {self.num_input:,} prompt tokens; it must have {num_blocks}: give one id per block"
            )

    def _refuse(self, name: str, limit: str) -> None:
        raise ConfigError(
            f"{name} of request {self.request_id!r} is {getattr(self, name)}; it must be {limit}: "
            "correct or drop the row"
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival, and the ranks of the adapters that they use."""

    name: str
    requests: tuple[TraceRequest, ...]
    adapters: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        last = 0.0
        for request in self.requests:
            if request.request_id in seen:
                raise ConfigError(
                    f"request_id {request.request_id!r} is in trace {self.name} twice: ids must be unique"
                )
            if request.arrival_s < last:
                raise ConfigError(
                    f"request {request.request_id!r} of trace {self.name} arrives before the one above it: "
                    "sort the rows by time"
                )
            if request.adapter is not None and request.adapter not in self.adapters:
                raise ConfigError(
                    f"adapter of request {request.request_id!r} is {request.adapter!r}, whose rank is not in "
                    f"trace {self.name}: give its rank"
                )
            seen.add(request.request_id)
            last = request.arrival_s

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def duration_s(self) -> float:
        """From the beginning to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Requests per second over the arrivals; infinite where all come at once."""
        return len(self.requests) / self.duration_s if self.duration_s else float("inf")

    @property
    def has_shared_prefixes(self) -> bool:
        """Whether some first block occurs twice."""
        firsts = [r.blocks[0] for r in self.requests if r.blocks]
        return len(set(firsts)) < len(firsts)

    def head(self, num_requests: int) -> Trace:
        """The first requests."""
        return replace(self, requests=self.requests[:num_requests])

    def at_rate(self, rate: float) -> Trace:
        """The same requests with all gaps stretched or squeezed alike, so that `rate` come per second."""
        if not rate > 0:
            raise ConfigError(f"rate is {rate}; it must be a positive number of requests per second")
        if not self.duration_s:
            raise ConfigError(
                f"rate is {rate} and all requests of trace {self.name} arrive at once: choose another trace"
            )
        factor = self.rate / rate
        return self.with_requests(replace(r, arrival_s=r.arrival_s * factor) for r in self.requests)

    def with_requests(self, requests: Iterable[TraceRequest]) -> Trace:
        return replace(self, requests=tuple(requests))
