"""What a run amounts to: percentiles, throughput, attainment, goodput, page use. No torch.

Definitions, the same for every policy:

- TTFT: first token minus arrival. TPOT: mean time of a request's tokens after the first. TBT: time between
  any two tokens of a request, preemptions included. Scheduling delay: first chunk's step minus arrival.
- throughput: completed requests over the time from the first arrival to the last token, drain included.
- attainment: share of all requests that met every limit set; refused, aborted and dropped ones missed.
- goodput: requests per second that met them, over the same time, and divided by devices.

A request's own deadlines hold where no limit of that kind is set for the whole run.
Sources: DistServe for goodput and attainment, Sarathi-Serve for TBT and scheduling delay, S-LoRA for
throughput with drain and for satisfaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polybatch.errors import ConfigError
from polybatch.request import Deadlines, FinishReason
from polybatch.simulate.cluster import Run
from polybatch.simulate.engine import Outcome

Slo = Deadlines
"""Limits for every request of a run: time to first token, per token after it, and to the last."""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of some time, in seconds; all None where there was none."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64]) -> Percentiles:
        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            return cls()
        p50, p90, p95, p99 = np.percentile(array, (50, 90, 95, 99))
        return cls(float(array.mean()), float(p50), float(p90), float(p95), float(p99), float(array.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The numbers of one run; times in seconds, rates per second. See the module for definitions.

    num_dropped: given up by the policy or left by their clients. satisfaction: mean of max(0, 1 - (TTFT /
    limit)^2), None without a limit on TTFT. workflow_attainment: share of workflows that ended in time.
    answers_right: of the predictions told at arrival, the share that came true. rows_per_step: sequences in
    a mean step. busy_share: of all engines' time. peak_kv_share: largest sampled share of a pool that
    running sequences held.
    """

    trace: str
    num_requests: int
    num_completed: int
    num_refused: int
    num_dropped: int
    wall_s: float
    offered_rate: float
    throughput: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft: Percentiles
    tpot: Percentiles
    tbt: Percentiles
    e2e: Percentiles
    scheduling_delay: Percentiles
    slo: dict[str, float | None] = field(default_factory=dict)
    attainment: float | None = None
    goodput: float | None = None
    goodput_per_device: float | None = None
    satisfaction: float | None = None
    workflow_attainment: float | None = None
    answers_right: float | None = None
    num_steps: int = 0
    rows_per_step: float = 0.0
    busy_share: float = 0.0
    num_preemptions: int = 0
    prefix_hit_share: float = 0.0
    num_adapters: int = 0
    num_adapter_loads: int = 0
    peak_kv_share: float = 0.0
    is_estimate: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def between_tokens(outcomes: Iterable[Outcome]) -> NDArray[np.float64]:
    """[gaps] seconds between consecutive tokens of every request."""
    gaps = [np.diff(outcome.token_times) for outcome in outcomes if len(outcome.token_times) > 1]
    return np.concatenate(gaps) if gaps else np.empty(0)


def meets(outcome: Outcome, slo: Slo | None) -> bool:
    """Whether a request got all its tokens within every limit that it has."""
    if outcome.reason not in (FinishReason.STOP, FinishReason.LENGTH):
        return False
    own = outcome.request.deadlines
    measured = {"ttft_s": outcome.ttft_s, "tpot_s": outcome.tpot_s, "e2e_s": outcome.e2e_s}
    for name, value in measured.items():
        limit = None if slo is None else getattr(slo, name)
        if limit is None and own is not None:
            limit = getattr(own, name)
        if limit is not None and value is not None and value > limit:
            return False
    return True


def report(run: Run, slo: Slo | None = None) -> Report:
    """Work a run's numbers out."""
    outcomes = run.outcomes
    done = [o for o in outcomes if o.reason in (FinishReason.STOP, FinishReason.LENGTH)]
    refused = sum(o.reason is FinishReason.ERROR for o in outcomes)
    first = min((o.sent_s for o in outcomes), default=0.0)
    wall = max((o.finished_s for o in outcomes if o.finished_s is not None), default=first) - first
    per_s = 1 / wall if wall > 0 else 0.0
    has_limits = slo is not None or any(o.request.deadlines for o in outcomes)
    num_met = sum(meets(o, slo) for o in outcomes) if has_limits else 0
    stats = [replica.scheduler.stats() for replica in run.replicas]
    num_queried = sum(s.num_prefix_query_tokens for s in stats)
    num_steps = run.num_steps
    ttft_limit = None if slo is None else slo.ttft_s
    return Report(
        trace=run.trace.name,
        num_requests=len(outcomes),
        num_completed=len(done),
        num_refused=refused,
        num_dropped=len(outcomes) - len(done) - refused,
        wall_s=wall,
        offered_rate=run.trace.rate if run.trace.duration_s else 0.0,
        throughput=len(done) * per_s,
        output_tokens_per_s=sum(len(o.token_times) for o in outcomes) * per_s,
        prompt_tokens_per_s=sum(o.request.num_input for o in outcomes if o.token_times) * per_s,
        ttft=Percentiles.of([t for o in outcomes if (t := o.ttft_s) is not None]),
        tpot=Percentiles.of([t for o in outcomes if (t := o.tpot_s) is not None]),
        tbt=Percentiles.of(between_tokens(outcomes)),
        e2e=Percentiles.of([t for o in done if (t := o.e2e_s) is not None]),
        scheduling_delay=Percentiles.of(
            [o.first_scheduled_s - o.sent_s for o in outcomes if o.first_scheduled_s is not None]
        ),
        slo={} if slo is None else {f.name: getattr(slo, f.name) for f in fields(slo)},
        attainment=num_met / len(outcomes) if has_limits else None,
        goodput=num_met * per_s if has_limits else None,
        goodput_per_device=(
            num_met * per_s / sum(r.machine.num_devices for r in run.replicas) if has_limits else None
        ),
        satisfaction=None if ttft_limit is None else satisfaction(outcomes, ttft_limit),
        workflow_attainment=workflow_attainment(outcomes),
        answers_right=answers_right(outcomes),
        num_steps=num_steps,
        rows_per_step=sum(r.num_rows for r in run.replicas) / max(1, num_steps),
        busy_share=sum(r.busy_s for r in run.replicas) * per_s / len(run.replicas),
        num_preemptions=sum(s.num_preemptions for s in stats),
        prefix_hit_share=sum(s.num_prefix_hit_tokens for s in stats) / max(1, num_queried),
        num_adapters=len({o.request.adapter for o in outcomes if o.request.adapter is not None}),
        num_adapter_loads=sum(s.num_adapter_loads for s in stats),
        peak_kv_share=max(max(r.pages.kv, default=0) / r.machine.pool.num_pages for r in run.replicas),
        is_estimate=any(r.machine.is_estimate for r in run.replicas),
    )


def satisfaction(outcomes: Sequence[Outcome], limit_s: float) -> float:
    """S-LoRA's: 1 for an instant first token, falling with its square to 0 at the limit."""
    waits = [o.ttft_s for o in outcomes]
    return sum(max(0.0, 1 - (t / limit_s) ** 2) for t in waits if t is not None) / max(1, len(waits))


def answers_right(outcomes: Sequence[Outcome]) -> float | None:
    """Of the requests told whether their deadlines will be met, the share that were told the truth."""
    told = [o.answer == meets(o, None) for o in outcomes if o.answer is not None]
    return sum(told) / len(told) if told else None


def workflow_attainment(outcomes: Sequence[Outcome]) -> float | None:
    """Share of workflows whose last call ended when it was due; None without workflows."""
    in_time: dict[str, bool] = {}
    for outcome in outcomes:
        stage = outcome.request.workflow
        if stage is not None:
            end = outcome.finished_s
            is_good = outcome.is_complete and end is not None and end <= stage.due_s
            in_time[stage.workflow_id] = in_time.get(stage.workflow_id, True) and is_good
    return sum(in_time.values()) / len(in_time) if in_time else None


def parse_slo(text: str) -> Slo:
    """Limits such as "ttft=0.3,tpot=0.05,e2e=10", in seconds. Raises ConfigError for anything else."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        key = f"{name}_s"
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if not equals or key not in {f.name for f in fields(Deadlines)} or not 0 < value < 1e9:
            raise ConfigError(
                f"slo is {text!r}; each part must be ttft, tpot or e2e, =, and a positive number of seconds: "
                "write for example ttft=0.3,tpot=0.05"
            )
        values[key] = value
    return Deadlines(**values)
