"""Live requests and an endless offline job in one engine: what the job costs, and what it gets.

Chats of Sarathi-Serve's lengths come at half the rate that the machine can serve; 400 + 100 tokens a row of
the job. Only chats count for latency, and only those that end while there are rows. The machine's busy share
is that of the time until then.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from polybatch.config import ServiceLevels
from polybatch.scheduling.track import BATCH_PRIORITY
from polybatch.simulate.cluster import Run, simulate
from polybatch.simulate.engine import EngineSettings, Outcome
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import between_tokens, report
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.sarathi import sarathi

LOAD = 0.5
NUM_CHATS = 400
NUM_ROWS = 8000
ROW_PROMPT, ROW_OUTPUT = 400, 100
MOST_S = 0.02
"""Of a step without chats: one that comes meanwhile waits for its end."""

WAYS = {
    "rows in slack": ServiceLevels(max_batch_step_s=MOST_S),
    "rows up to 50 ms a step": ServiceLevels(batch_slowdown=None, max_batch_step_s=MOST_S, target_tbt_s=0.05),
    "steps up to twice as long": ServiceLevels(batch_slowdown=1.0, max_batch_step_s=MOST_S),
    "rows without limit": ServiceLevels(batch_slowdown=None),
}


def live_and_offline(machine: Machine) -> dict[str, Any]:
    """P99 of chats alone and beside rows, and how busy the machine is."""
    chats = sarathi(num_requests=NUM_CHATS, seed=5)
    at_once = chats.with_requests(replace(r, arrival_s=0.0) for r in chats.requests)
    capacity = report(simulate(at_once, machine, _settings(ServiceLevels()))).throughput
    chats = chats.at_rate(LOAD * capacity)
    both = Trace("chats and rows", (*_rows(), *chats.requests))
    rows: list[dict[str, Any]] = []
    for name, levels in WAYS.items():
        alone = _measured(simulate(chats, machine, _settings(levels)))
        beside = _measured(simulate(both, machine, _settings(levels)))
        costs = {key: beside[key] / alone[key] - 1 for key in ("ttft_p99", "tbt_p99", "ttft_p50", "tbt_p50")}
        rows.append({"way": name, "alone": alone, "beside_rows": beside, "cost": costs})
    jobs = Trace("rows", tuple(_rows()[: NUM_ROWS // 4]))
    first = rows[0]
    return {
        "claim": "rows in slack cost live P99 TTFT and TBT under 0.1, and the machine is busy for 0.9",
        "holds": first["cost"]["ttft_p99"] < 0.1
        and first["cost"]["tbt_p99"] < 0.1
        and first["beside_rows"]["busy_share"] >= 0.9,
        "capacity": capacity,
        "rows_alone_tokens_per_s": report(
            simulate(jobs, machine, _settings(ServiceLevels()))
        ).output_tokens_per_s,
        "rows": rows,
    }


def _rows() -> list[TraceRequest]:
    return [
        TraceRequest(
            request_id=f"row-{i}", arrival_s=0.0, num_input=ROW_PROMPT, num_output=ROW_OUTPUT,
            priority=BATCH_PRIORITY,
        )
        for i in range(NUM_ROWS)
    ]  # fmt: skip


def _measured(run: Run) -> dict[str, float]:
    live = [o for o in run.outcomes if o.request.priority < BATCH_PRIORITY]
    rows = [o for o in run.outcomes if o.request.priority >= BATCH_PRIORITY]
    end_s = max(_end_s(o) for o in live)
    if rows:
        end_s = min(end_s, max(_end_s(o) for o in rows))
        live = [o for o in live if _end_s(o) <= end_s]
    # Idle time after that counts as well: the share is at least this.
    idle_s = run.wall_s - run.replicas[0].busy_s
    ttft = [o.ttft_s for o in live if o.ttft_s is not None]
    gaps = between_tokens(live)
    return {
        "ttft_p50": float(np.percentile(ttft, 50)), "ttft_p99": float(np.percentile(ttft, 99)),
        "tbt_p50": float(np.percentile(gaps, 50)), "tbt_p99": float(np.percentile(gaps, 99)),
        "busy_share": 1 - idle_s / end_s,
        "window_s": end_s, "num_chats": len(live),
        "row_tokens_per_s": sum(sum(t <= end_s for t in o.token_times) for o in rows) / end_s,
    }  # fmt: skip


def _end_s(outcome: Outcome) -> float:
    return inf if outcome.finished_s is None else outcome.finished_s


def _settings(levels: ServiceLevels) -> EngineSettings:
    return EngineSettings(enable_prefix_caching=False, service=levels)
