"""Traces, a small machine and a cost model whose steps are easy to work out by hand."""

from __future__ import annotations

from polybatch.config import PoolSpec
from polybatch.scheduling.costs import CostModel
from polybatch.simulate.cluster import Run
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.traces import Trace, TraceRequest

BASE_S = 0.010
TOKEN_S = 0.001

SETTINGS = EngineSettings()


def machine_of(num_pages: int = 1000, **changes: object) -> Machine:
    """A step takes 10 ms, and 1 ms more per token."""
    values: dict[str, object] = {
        "name": "small",
        "costs": CostModel(base=BASE_S, per_token=TOKEN_S),
        "pool": PoolSpec(num_pages=num_pages, page_size=16, page_bytes=1024, num_layers=2),
        "adapter_bytes_per_rank": 256.0,
        "max_num_batched_tokens": 512,
        **changes,
    }
    return Machine(**values)  # type: ignore[arg-type]


def request_of(
    number: int, at: float = 0.0, num_input: int = 32, num_output: int = 4, **more: object
) -> TraceRequest:
    return TraceRequest(
        request_id=f"r{number}", arrival_s=at, num_input=num_input, num_output=num_output, **more
    )  # type: ignore[arg-type]


def trace_of(*requests: TraceRequest, adapters: dict[str, int] | None = None) -> Trace:
    return Trace("test", requests, adapters or {})


def check(run: Run) -> None:
    """What holds after every run: all ended, all tokens came in order, and no page is lost."""
    for outcome in run.outcomes:
        assert outcome.reason is not None
        assert outcome.token_times == sorted(outcome.token_times)
        if outcome.error is None and outcome.reason.value in ("stop", "length"):
            assert outcome.is_complete
            assert outcome.token_times[-1] == outcome.finished_s
    for replica in run.replicas:
        replica.scheduler.check()
        assert not replica.scheduler.has_work
        assert replica.scheduler.arena.num_kv == 0
