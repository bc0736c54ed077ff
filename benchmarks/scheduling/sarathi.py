"""Sarathi-Serve's claim that long prompts do not hold up decodes, and its choice of a token budget."""

from __future__ import annotations

from typing import Any

import numpy as np

from polybatch.config import ServiceLevels
from polybatch.scheduling.costs import StepShape
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import between_tokens
from polybatch.simulate.traces import Trace, TraceRequest

WHOLE_PROMPTS = 16_384
TILE = 256


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
