"""Sarathi-Serve's claims: capacity by way of batching, and decodes that long prompts do not hold up.

Capacity is the highest Poisson rate with P99 TBT within its limit and a median scheduling delay of at most 2
s. The limits are 5 (strict) and 25 times (relaxed) a decode step of 32 rows with 4,096 tokens each.
Stall-free batching and its chunk-only ablation get the largest token budget whose step stays within the
limit beside those decodes; the others take prompts whole. The last row chooses the budget step by step from
the cost model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from polybatch.config import ServiceLevels
from polybatch.scheduling.costs import StepShape
from polybatch.simulate.capacity import keeps_pace, search_capacity
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import Report, between_tokens, report
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.sarathi import sarathi

WHOLE_PROMPTS = 16_384
TILE = 256
NUM_REQUESTS = 400


def token_budget(machine: Machine, limit_s: float) -> int:
    """Largest multiple of 256 tokens whose step, beside 32 decodes at 4,096 tokens, takes at most limit_s."""
    tokens = TILE
    while tokens < WHOLE_PROMPTS:
        n_new = tokens + TILE
        shape = StepShape(
            num_tokens=n_new + 32, num_decodes=32, num_prefill_tokens=n_new, decode_context=32 * 4096,
            prefill_pairs=n_new * 8192, num_logits=33, num_prefills=1, prefill_context=8192,
        )  # fmt: skip
        if machine.costs.predict(shape) > limit_s:
            break
        tokens = n_new
    return tokens


def capacity(machine: Machine) -> dict[str, Any]:
    """The capacity of every way of batching, per data set and limit."""
    decode_s = machine.decode_s(32, 4096)
    rows = []
    holds = []
    for lengths in ("sharegpt4", "arxiv"):
        trace = sarathi(lengths=lengths, num_requests=NUM_REQUESTS, seed=1)

        def trial(rate: float, settings: EngineSettings, trace: Trace = trace) -> Report:
            return report(simulate(trace.at_rate(rate), machine, settings))

        start = _start_rate(machine, trace)
        for name, factor in (("strict", 5), ("relaxed", 25)):
            limit_s = factor * decode_s
            budget = token_budget(machine, limit_s)
            found = {}
            for label, settings in _ways(budget, limit_s).items():
                result = search_capacity(
                    partial(trial, settings=settings), keeps_pace(limit_s), start, granularity=0.05
                )
                found[label] = result.rate
                rows.append(
                    {"lengths": lengths, "limit": name, "tbt_limit_s": limit_s, "batching": label,
                     "token_budget": settings.max_num_batched_tokens, "capacity": result.rate,
                     "at_capacity": _short(result.report)}
                )  # fmt: skip
            holds.append(_claims(lengths, name, found))
    return {
        "claim": "capacity of stall-free: at least its ablations', twice prefill-first's at the strict limit",
        "holds": all(
            good
            for claims in holds
            for name, good in claims["holds"].items()
            if claims["limit"] == "strict" or name != "twice prefill_first"
        ),
        "orderings": holds,
        "rows": rows,
    }


def _ways(budget: int, limit_s: float) -> dict[str, EngineSettings]:
    def way(batching: str, tokens: int, **more: Any) -> EngineSettings:
        return EngineSettings(
            batching=batching, max_num_batched_tokens=tokens, enable_prefix_caching=False, **more
        )

    return {
        "prefill_first": way("prefill_first", WHOLE_PROMPTS),
        "hybrid_only": way("hybrid_only", WHOLE_PROMPTS),
        "chunk_only": way("chunk_only", budget),
        "stall_free": way("stall_free", budget),
        "stall_free, budget per step": way(
            "stall_free", WHOLE_PROMPTS, service=ServiceLevels(target_tbt_s=limit_s)
        ),
    }


def _claims(lengths: str, limit: str, found: dict[str, float]) -> dict[str, Any]:
    best = max(found["stall_free"], found["stall_free, budget per step"])
    # A capacity is known to 5 %.
    return {
        "lengths": lengths,
        "limit": limit,
        "stall_free over prefill_first": best / found["prefill_first"] if found["prefill_first"] else None,
        "holds": {
            "twice prefill_first": best >= 2 * found["prefill_first"],
            "hybrid_only": best >= 0.95 * found["hybrid_only"],
            "chunk_only": best >= 0.95 * found["chunk_only"],
        },
    }


def _start_rate(machine: Machine, trace: Trace) -> float:
    """A quarter of the rate at which prefills alone would fill the machine."""
    prompts = float(np.mean([r.num_input for r in trace.requests]))
    return 0.25 / (prompts * machine.prefill_s(8192) / 8192)


def _short(found: Report | None) -> dict[str, float | None]:
    if found is None:
        return {}
    return {
        "ttft_p50": found.ttft.p50, "tbt_p50": found.tbt.p50, "tbt_p99": found.tbt.p99,
        "scheduling_delay_p50": found.scheduling_delay.p50, "rows_per_step": found.rows_per_step,
    }  # fmt: skip


def long_prompts(machine: Machine) -> dict[str, Any]:
    """P99 TBT of 32 talks while documents of 16,384 tokens come in, against the talks alone."""
    talks = [
        TraceRequest(request_id=f"talk-{i}", arrival_s=0.0, num_input=1024, num_output=2000)
        for i in range(32)
    ]
    documents = [
        TraceRequest(request_id=f"doc-{i}", arrival_s=1.0 + 0.8 * i, num_input=16_384, num_output=1)
        for i in range(20)
    ]
    alone = Trace("talks", tuple(talks))
    both = Trace("talks and documents", (*talks, *documents))
    base = EngineSettings(enable_prefix_caching=False)
    run = simulate(alone, machine, base)
    quiet = _p99(run)
    limit_s = 1.5 * quiet
    ways = {
        "prefill_first": EngineSettings(batching="prefill_first", max_num_batched_tokens=WHOLE_PROMPTS),
        "hybrid_only": EngineSettings(batching="hybrid_only", max_num_batched_tokens=WHOLE_PROMPTS),
        "stall_free": EngineSettings(),
        "stall_free, budget per step": EngineSettings(service=ServiceLevels(target_tbt_s=limit_s)),
    }
    rows: list[dict[str, Any]] = [{"batching": "talks alone", "tbt_p99": quiet, "ratio": 1.0}]
    for label, settings in ways.items():
        found = simulate(both, machine, settings)
        p99 = _p99(found)
        firsts = [o.ttft_s or 0.0 for o in found.outcomes if o.request.request_id.startswith("doc")]
        rows.append(
            {
                "batching": label,
                "tbt_p99": p99,
                "ratio": p99 / quiet,
                "document_ttft_p50": float(np.median(firsts)),
            }
        )
    return {
        "claim": "P99 TBT with long prompts is at most 1.5 times that of the decodes alone",
        "holds": rows[-1]["ratio"] <= 1.5,
        "rows": rows,
    }


def _p99(run: Any) -> float:
    talks = [o for o in run.outcomes if o.request.request_id.startswith("talk")]
    return float(np.percentile(between_tokens(talks), 99))
