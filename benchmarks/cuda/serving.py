"""Requests that arrive in real time, played into the engine's loop; what they waited and what came out.

One thread submits and steps, as the engine's own process would: a request that arrives during a step is
submitted after it, and its waiting counts from its arrival. When the time is up, what still runs is aborted,
so that overload shows as throughput and waiting and not as a long drain.

What is counted begins after a warm-up. Throughput with many adapters means something once the working set is
saturated: all rows taken, and taken over from the first ones by others. The first is so from `queued_from_s`
on, the second some lifetimes of a request later; thirds of the window tell whether it still changes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.cuda.workloads import TimedRequest
from polybatch.engine.core import EngineCore
from polybatch.errors import EngineError
from polybatch.request import RequestOutput, SamplingParams, SequenceStatus

SLO_S = 6.0
"""First token within this time, as in S-LoRA's experiments."""

SAMPLE_S = 0.5
"""Between two looks at what runs and waits."""


@dataclass(frozen=True, slots=True)
class Served:
    """What came of the traffic in the window from warm_s to the end.

    out_tok_s: tokens of all requests over the window. req_s: requests that finished in it. TTFT: of requests
    that arrived in it; who has no token at the end counts with what it has waited, so overload cannot hide.
    attainment: share of those with a first token within SLO_S. num_loads: adapters copied to the device.
    rows, adapters: that ran, and distinct ones of them, on the average. num_waiting: at the end.
    queued_from_s: since when, from the start of the traffic, requests always waited; None if none did at the
    end. out_tok_s_thirds: of the window; empty where it is too short for samples of all three.
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
    num_steps: int
    rows: float
    adapters: float
    num_waiting: int
    queued_from_s: float | None
    out_tok_s_thirds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    """What was so at a moment, in seconds from the start: sequences by state, adapters, tokens so far."""

    at_s: float
    num_rows: int
    num_adapters: int
    num_waiting: int
    num_output_tokens: int


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
    samples: list[_Sample] = []
    position = 0
    while (now := clock() - start) < duration_s:
        if before is None and now >= warm_s:
            before, window_start = core.stats(), now
        if not samples or now - samples[-1].at_s >= SAMPLE_S:
            samples.append(_sample(core, now))
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
    samples.append(_sample(core, end))
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
    counted = [sample for sample in samples if sample.at_s >= window_start]
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
        num_steps=after.times.num_steps - before.times.num_steps,
        rows=round(statistics.fmean(sample.num_rows for sample in counted), 1),
        adapters=round(statistics.fmean(sample.num_adapters for sample in counted), 1),
        num_waiting=samples[-1].num_waiting,
        queued_from_s=_queued_from(samples),
        out_tok_s_thirds=_thirds(counted),
    )


def _sample(core: EngineCore, now: float) -> _Sample:
    running = [seq for seq in core.scheduler.live() if seq.status is SequenceStatus.RUNNING]
    stats = core.stats()
    digests = {seq.adapter.digest for seq in running if seq.adapter is not None}
    num_waiting = stats.scheduler.num_waiting
    return _Sample(round(now, 3), len(running), len(digests), num_waiting, stats.num_output_tokens)


def _queued_from(samples: Sequence[_Sample]) -> float | None:
    """When the queue began that was there until the end."""
    start = None
    for sample in reversed(samples):
        if sample.num_waiting == 0:
            break
        start = sample.at_s
    return start


def _thirds(samples: Sequence[_Sample]) -> tuple[float, ...]:
    """Output tokens per second between samples at thirds of the time."""
    if len(samples) < 4:
        return ()
    at = [samples[i * (len(samples) - 1) // 3] for i in range(4)]
    return tuple(
        round((b.num_output_tokens - a.num_output_tokens) / (b.at_s - a.at_s), 1) for a, b in pairwise(at)
    )


def _submit(core: EngineCore, request_id: str, timed: TimedRequest) -> None:
    request = timed.request
    params = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
    core.add_request(request_id, list(request.token_ids), params, request.adapter)


def _waited(timed: TimedRequest, output: RequestOutput, start: float, end: float) -> tuple[float, bool]:
    """Seconds to the first token or, without one, to the end; and whether there was one."""
    first = None if output.metrics is None else output.metrics.first_token_s
    return (end - timed.at_s, False) if first is None else (first - start - timed.at_s, True)
