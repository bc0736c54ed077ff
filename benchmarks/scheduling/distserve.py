"""Two machines, colocated or disaggregated: DistServe's goodput on its workloads, per machine.

Goodput is the highest Poisson rate at which nine tenths of requests meet both TTFT and TPOT. Colocated
engines run chunked prefill with the budget chosen per step, which DistServe's own baseline did not have.
Source: DistServe (Zhong et al. 2024), metric and workloads.
"""

from __future__ import annotations

from typing import Any

from polybatch.simulate.capacity import keeps_attainment, search_capacity
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import Report, report
from polybatch.simulate.workloads.distserve import distserve

NUM_REQUESTS = 1000
TASKS = ("chat", "summarisation")
SCALES = (1.0, 0.25)
"""Of the limits for a model of 13B; the second is near what a step takes here."""


def goodput(machine: Machine) -> dict[str, Any]:
    """Goodput per machine of both ways, by task and limits."""
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        for scale in SCALES:
            found = {
                way: _search(machine, task, scale, num_prefill)
                for way, num_prefill in (("colocated", 0), ("disaggregated 1:1", 1))
            }
            rows.append({"task": task, "slo_scale": scale, "goodput_per_machine": found})
    orders = {
        f"{row['task']}, limits * {row['slo_scale']:g}": row["goodput_per_machine"]["colocated"]
        >= row["goodput_per_machine"]["disaggregated 1:1"]
        for row in rows
    }
    return {
        "claim": "chunked prefill on two machines has at least the goodput of one for each phase",
        "holds": all(orders.values()),
        "orderings": orders,
        "rows": rows,
    }


def _search(machine: Machine, task: str, scale: float, num_prefill: int) -> float:
    trace = distserve(task=task, slo_scale=scale, num_requests=NUM_REQUESTS)
    settings = EngineSettings(enable_prefix_caching=False)

    def trial(rate: float) -> Report:
        run = simulate(
            trace.at_rate(rate), [machine] * 2, settings, router="least-work", num_prefill=num_prefill
        )
        return report(run)

    return search_capacity(trial, keeps_attainment(), 8.0, granularity=0.1, max_trials=10).rate / 2
