"""Sarathi-Serve's claim: how much more a machine carries if prompts never stall decodes.

Capacity is the highest Poisson rate with P99 TBT within its limit and a median scheduling delay of at most 2
s; no limit on TTFT. The limits are 5 (strict) and 25 times (relaxed) a decode step of 32 rows with 4,096
tokens each. As in the paper, a trial has 2,048 requests (a trace: all it has, at most so many), at most 128
run at once, and the ways that take prompts whole may put as many tokens in a step as the longest sequence of
the workload has: vLLM's limit. Stall-free batching and its chunk-only ablation get the largest token budget
whose step stays within the limit beside those decodes. The last way chooses the budget step by step from the
cost model.

Beside them stands the most that can be sustained: the rate at which the arithmetic and memory traffic of the
requests alone, by the same cost model, fill the machine, every step taking as long as the limit allows. The
same with shortest prompts first shows why the order must be that of arrival: as the metric looks at the
median delay only, whoever lets the longer half starve exceeds every bound. It counts for no claim.
Source: Sarathi-Serve (Agrawal et al. 2024), section 5, and its capacity search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scheduling.sarathi import token_budget
from polybatch.config import ServiceLevels
from polybatch.scheduling.costs import CostModel
from polybatch.simulate.capacity import keeps_pace, search_capacity
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine, scaled
from polybatch.simulate.readers import read_trace
from polybatch.simulate.report import Report, report
from polybatch.simulate.traces import Trace
from polybatch.simulate.workloads.arrivals import gamma_arrivals
from polybatch.simulate.workloads.sarathi import DATA_SETS, sarathi

NUM_REQUESTS = 2048
MAX_NUM_SEQS = 128
LIMITS = {"strict": 5, "relaxed": 25}
GRANULARITY = 0.05
NEAR_IDEAL = 0.8
CLAIM = (
    f"capacity of stall-free: at least its ablations', and twice prefill-first's or {NEAR_IDEAL} of what "
    "can be sustained at all"
)
DATA = Path(__file__).parents[3] / "shared" / "data"
TRACES = {"azure_code": "azure_llm_code_2023.csv", "mooncake": "mooncake_conversation_first_half.jsonl"}

A100_ARITHMETIC, A100_BANDWIDTH = 312 / 989, 2.04 / 3.35
"""An A100 of 80 GB as a multiple of an H100: dense TFLOP/s in bfloat16, TB/s (their data sheets)."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests at Poisson times, and the longest sequence that may come."""

    name: str
    trace: Trace
    max_len: int


def capacity(machine: Machine) -> dict[str, Any]:
    """The capacity of every way of batching, per workload and limit, on the measured machine."""
    rows = [row for workload in (*data_sets(), *traces()) for row in _search(machine, workload, all_ways)]
    return _judged(rows)


def on_a100(machine: Machine) -> dict[str, Any]:
    """Estimates of the paper's machines: a model of 8B on one A100, of 34B on two."""
    rows = []
    for label, other in a100_machines(machine).items():
        for workload in data_sets():
            rows += [{"machine": label, **row} for row in _search(other, workload, two_ways)]
    return _judged(rows)


def _judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim, whether it holds in each group of rows, and the rows."""
    orderings = [_claims(group) for group in _groups(rows)]
    return {
        "claim": CLAIM,
        "holds": all(all(found["holds"].values()) for found in orderings),
        "orderings": orderings,
        "rows": rows,
    }


def a100_machines(machine: Machine) -> dict[str, Machine]:
    def other(parameters: float, num_devices: int) -> Machine:
        return scaled(
            machine, parameters=parameters, num_devices=num_devices, arithmetic=A100_ARITHMETIC,
            bandwidth=A100_BANDWIDTH,
        )  # fmt: skip

    return {"8B on an A100": other(1.0, 1), "34B on two A100": other(34.4 / 8.03, 2)}


def data_sets() -> list[Workload]:
    return [
        Workload(name, sarathi(lengths=name, num_requests=NUM_REQUESTS, seed=1), source.limit)
        for name, source in DATA_SETS.items()
    ]


def traces() -> list[Workload]:
    """Lengths of services' traces at Poisson times, without their prefixes; none where the data is not."""
    found = []
    for name, file in TRACES.items():
        if (DATA / file).is_file():
            source = read_trace(DATA / file).head(NUM_REQUESTS)
            times = gamma_arrivals(np.random.RandomState(1), len(source), 1.0)
            plain = source.with_requests(
                replace(request, blocks=(), arrival_s=float(at))
                for request, at in zip(source.requests, times, strict=True)
            )
            longest = max(request.num_input + request.num_output for request in plain.requests)
            found.append(Workload(name, plain, longest))
    return found


def ideal_rate(machine: Machine, trace: Trace, limit_s: float) -> float:
    """Requests per second that fill the machine if every step takes the limit and wastes nothing.

    What a step costs whatever it carries, less what it computes for nothing while it waits for memory, is
    paid once per limit; all else once per request. Launches, queues and pages are left out: an upper bound.
    """
    costs = machine.costs
    assert isinstance(costs, CostModel), "the bound is a sum of the model's coefficients"
    prompts = np.array([request.num_input for request in trace.requests], dtype=np.float64)
    outputs = np.array([request.num_output for request in trace.requests], dtype=np.float64)
    decodes = outputs - 1
    context = decodes * prompts + decodes * outputs / 2
    seconds = (
        (prompts + decodes) * (costs.per_token + costs.per_token_beyond)
        + decodes * costs.per_decode
        + outputs * costs.per_logit
        + context * costs.per_context
        + prompts * (prompts + 1) / 2 * costs.per_pair
        + costs.per_prefill
    )
    per_step = costs.base + costs.per_head + costs.per_mixed - costs.hinge * costs.per_token_beyond
    return float((1 - max(0.0, per_step) / limit_s) / seconds.mean())


Ways = Callable[[Machine, Workload, float], dict[str, EngineSettings]]


def all_ways(machine: Machine, workload: Workload, limit_s: float) -> dict[str, EngineSettings]:
    found = two_ways(machine, workload, limit_s)
    return {
        "prefill_first": found["prefill_first"],
        "hybrid_only": replace(found["prefill_first"], batching="hybrid_only"),
        "chunk_only": replace(found["stall_free"], batching="chunk_only"),
        "stall_free": found["stall_free"],
        "stall_free, budget per step": found["stall_free, budget per step"],
        "the same, shortest first": replace(found["stall_free, budget per step"], policy="shortest_first"),
    }


def two_ways(machine: Machine, workload: Workload, limit_s: float) -> dict[str, EngineSettings]:
    def way(batching: str, tokens: int, target_s: float | None = None) -> EngineSettings:
        return EngineSettings(
            batching=batching, max_num_batched_tokens=tokens, max_num_seqs=MAX_NUM_SEQS,
            enable_prefix_caching=False, service=ServiceLevels(target_tbt_s=target_s),
        )  # fmt: skip

    return {
        "prefill_first": way("prefill_first", workload.max_len),
        "stall_free": way("stall_free", token_budget(machine, limit_s)),
        "stall_free, budget per step": way("stall_free", workload.max_len, limit_s),
    }


def _search(machine: Machine, workload: Workload, ways: Ways) -> list[dict[str, Any]]:
    decode_s = machine.decode_s(32, 4096)
    reports: dict[tuple[EngineSettings, float], Report] = {}
    rows = []
    for limit, factor in LIMITS.items():
        limit_s = factor * decode_s
        ideal = ideal_rate(machine, workload.trace, limit_s)
        start = ideal_rate(machine, workload.trace, 25 * decode_s) / 4
        for label, settings in ways(machine, workload, limit_s).items():

            def trial(rate: float, settings: EngineSettings = settings) -> Report:
                # Ways that do not know the limit do the same under both.
                key = (settings, rate)
                if key not in reports:
                    reports[key] = report(simulate(workload.trace.at_rate(rate), machine, settings))
                return reports[key]

            found = search_capacity(trial, keeps_pace(limit_s), start, granularity=GRANULARITY)
            rows.append(
                {"lengths": workload.name, "limit": limit, "tbt_limit_s": limit_s, "batching": label,
                 "token_budget": settings.max_num_batched_tokens, "capacity": found.rate, "ideal": ideal,
                 "of_ideal": found.rate / ideal, "at_capacity": _short(found.report)}
            )  # fmt: skip
            print(workload.name, limit, label, f"{found.rate:.2f}/s of {ideal:.2f}/s", flush=True)
    return rows


def _groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one machine, workload and limit."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row.get("machine", ""), row["lengths"], row["limit"]), []).append(row)
    return list(groups.values())


def _claims(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: Mapping[str, float] = {row["batching"]: row["capacity"] for row in rows}
    best = max(found["stall_free"], found["stall_free, budget per step"])
    first, ideal = found["prefill_first"], rows[0]["ideal"]
    # A capacity is known to 5 %.
    holds = {name: best >= 0.95 * found[name] for name in ("hybrid_only", "chunk_only") if name in found}
    return {
        **{name: rows[0][name] for name in ("machine", "lengths", "limit") if name in rows[0]},
        "stall_free over prefill_first": best / first if first else None,
        "ideal over prefill_first": ideal / first if first else None,
        "stall_free of ideal": best / ideal,
        "is twice prefill_first": best >= 2 * first,
        "holds": {**holds, "twice or near ideal": best >= min(2 * first, NEAR_IDEAL * ideal)},
    }


def _short(found: Report | None) -> dict[str, float | None]:
    if found is None:
        return {}
    return {
        "ttft_p50": found.ttft.p50, "tbt_p50": found.tbt.p50, "tbt_p99": found.tbt.p99,
        "scheduling_delay_p50": found.scheduling_delay.p50,
        "scheduling_delay_max": found.scheduling_delay.max, "rows_per_step": found.rows_per_step,
        "busy_share": found.busy_share, "num_preemptions": found.num_preemptions,
    }  # fmt: skip
