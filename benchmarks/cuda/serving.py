"""Requests that arrive in real time, played into the engine's loop; what they waited and what came out.

One thread submits and steps, as the engine's own process would: a request that arrives during a step is
submitted after it, and its waiting counts from its arrival. When the time is up, what still runs is aborted,
so that overload shows as throughput and waiting and not as a long drain.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cuda.workloads import TimedRequest
from polybatch.engine.core import EngineCore
from polybatch.errors import EngineError
from polybatch.request import RequestOutput, SamplingParams

SLO_S = 6.0
"""First token within this time, as in S-LoRA's experiments."""


@dataclass(frozen=True, slots=True)
class Served:
    """What came of the traffic in the window from warm_s to the end.

    out_tok_s: tokens of all requests over the window. req_s: requests that finished in it. TTFT: of requests
    that arrived in it; who has no token at the end counts with what it has waited, so overload cannot hide.
    attainment: share of those with a first token within SLO_S. num_loads: adapters copied to the device.
    """

    window_s: float
    num_arrived: int
    num_finished: int
    num_without_token: int
    out_tok_s: float
    req_s: float
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p90_ms: float
    attainment: float
    num_loads: int
    num_preemptions: int


def replay(
    core: EngineCore,
    arrivals: Sequence[TimedRequest],
    duration_s: float,
    warm_s: float = 0.0,
    *,
    label: str = "traffic",
    clock: Callable[[], float] = time.monotonic,
) -> Served:
    """Play requests for duration_s seconds. clock: the engine's. The engine must be idle, and is afterwards.

    Raises EngineError if a request fails or none arrives.
    """
    if core.has_work():
        raise EngineError("the engine still has work: replay needs an idle one")
    start = clock()
    live: dict[str, TimedRequest] = {}
    ended: list[tuple[TimedRequest, RequestOutput]] = []
    before = None
    position = 0
    while (now := clock() - start) < duration_s:
        if before is None and now >= warm_s:
            before, window_start = core.stats(), now
        while position < len(arrivals) and arrivals[position].at_s <= now:
            request_id = f"{label}-{position}"
            live[request_id] = arrivals[position]
            _submit(core, request_id, arrivals[position])
            position += 1
        if core.has_work():
            for output in core.step():
                ended.append((live.pop(output.request_id), output))
        else:
            following = arrivals[position].at_s if position < len(arrivals) else duration_s
            time.sleep(max(0.0, min(following, duration_s) - (clock() - start)))
    end, after = clock() - start, core.stats()
    aborted = [(timed, core.abort(request_id)) for request_id, timed in live.items()]
    core.drain()
    if before is None:
        raise EngineError(f"one step outlasted {warm_s} s of warm-up: nothing was measured")
    for _, output in ended:
        if output.error is not None:
            raise EngineError(f"request {output.request_id} failed: {output.error}")
    everyone = ended + [(timed, output) for timed, output in aborted if output is not None]
    waits = [_waited(timed, output, start, end) for timed, output in everyone if timed.at_s >= warm_s]
    if not waits:
        raise EngineError(
            f"no request arrived between {warm_s} and {duration_s} s: raise the rate or the time"
        )
    ttft_ms = sorted(1000 * wait for wait, _ in waits)
    finished = [o for _, o in ended if o.metrics and (o.metrics.finished_s or 0) - start >= window_start]
    window_s = end - window_start
    quantiles = statistics.quantiles(ttft_ms * 2, n=10, method="inclusive")
    return Served(
        window_s=round(window_s, 3),
        num_arrived=len(waits),
        num_finished=len(finished),
        num_without_token=sum(not has_token for _, has_token in waits),
        out_tok_s=round((after.num_output_tokens - before.num_output_tokens) / window_s, 1),
        req_s=round(len(finished) / window_s, 3),
        ttft_mean_ms=round(statistics.fmean(ttft_ms), 2),
        ttft_p50_ms=round(quantiles[4], 2),
        ttft_p90_ms=round(quantiles[8], 2),
        attainment=round(statistics.fmean(ok and wait <= SLO_S for wait, ok in waits), 4),
        num_loads=after.scheduler.num_adapter_loads - before.scheduler.num_adapter_loads,
        num_preemptions=after.scheduler.num_preemptions - before.scheduler.num_preemptions,
    )


def _submit(core: EngineCore, request_id: str, timed: TimedRequest) -> None:
    request = timed.request
    params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
    core.add_request(request_id, list(request.token_ids), params, request.adapter)


def _waited(timed: TimedRequest, output: RequestOutput, start: float, end: float) -> tuple[float, bool]:
    """Seconds to the first token or, without one, to the end; and whether there was one."""
    first = None if output.metrics is None else output.metrics.first_token_s
    return (end - timed.at_s, False) if first is None else (first - start - timed.at_s, True)
