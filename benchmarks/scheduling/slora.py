"""S-LoRA's claims: admission control above capacity, and throughput whatever the number of adapters.

The generator is S-LoRA's; rates are set from this machine's own capacity, measured first on the same
workload. A request counts when its first token comes within 6 s; those that are given up count as misses.
"""

from __future__ import annotations

from typing import Any

from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import Report, report
from polybatch.simulate.workloads.slora import slora

VARIATIONS = (1.0, 2.0, 4.0, 6.0, 8.0)
OVERLOAD = 1.3
ORDER = ("fcfs", "newest_first", "early_abort")


def saturated(machine: Machine, num_adapters: int = 200) -> float:
    """Requests per second where all are there at once."""
    trace = slora(rate=1000.0, duration_s=3.0, num_adapters=num_adapters)
    return report(simulate(trace, machine, _settings("fcfs"))).throughput


def admission(machine: Machine) -> dict[str, Any]:
    """Attainment of three orders at 1.3 times capacity, for arrivals more and more uneven."""
    rate = OVERLOAD * saturated(machine)
    rows: list[dict[str, Any]] = []
    for cv in VARIATIONS:
        trace = slora(rate=rate, duration_s=120.0, cv=cv)
        for policy in ORDER:
            found = report(simulate(trace, machine, _settings(policy)))
            rows.append({"cv": cv, "policy": policy, "offered": trace.rate, **_short(found)})
    by = {(row["cv"], row["policy"]): row["attainment"] for row in rows}
    orders = {
        f"cv={cv:g}": by[cv, "early_abort"] > by[cv, "newest_first"] > by[cv, "fcfs"] for cv in VARIATIONS
    }
    return {
        "claim": "attainment: early abort above newest first above first come, for cv from 1 to 8",
        "holds": all(orders.values()),
        "orderings": orders,
        "rate": rate,
        "rows": rows,
    }


def adapters(machine: Machine) -> dict[str, Any]:
    """Throughput under saturation for 2 to 2,000 adapters of ranks 64, 32, 16, 8.

    A step reads every adapter of its rows, so what counts is how many of those differ: with 64 rows nearly
    all do from 100 adapters on, as in the paper's runs; with 256 their number goes on growing, and grouping
    waiting requests by adapter (`adapter_cluster`) is what keeps it down. All of the queue counts for that:
    of 4,000 requests for 400 adapters ten want the same, so 26 adapters could fill 256 rows.
    """
    ways = {
        "64 rows": EngineSettings(max_num_seqs=64, enable_prefix_caching=False, has_costs=False),
        "256 rows": _settings("fcfs"),
        "256 rows, clusters of 16": EngineSettings(
            adapter_cluster=16, enable_prefix_caching=False, has_costs=False
        ),
    }
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, float]] = {}
    for name, settings in ways.items():
        by: dict[int, float] = {}
        for num in (2, 100, 400, 2000):
            trace = slora(rate=100.0, duration_s=40.0, num_adapters=num)
            found = report(simulate(trace, machine, settings))
            by[num] = found.throughput
            rows.append({"way": name, "num_adapters": num, "num_used": found.num_adapters, **_short(found)})
        pairs = ((100, 2), (400, 100), (2000, 100))
        ratios[name] = {f"{more} over {fewer}": by[more] / by[fewer] for more, fewer in pairs}
    return {
        "claim": "with 400 adapters at least 0.9 of the throughput with 100, in 64 rows and in 256",
        "holds": all(found["400 over 100"] >= 0.9 for found in ratios.values()),
        "ratios": ratios,
        "rows": rows,
    }


def _settings(policy: str) -> EngineSettings:
    # None of the three asks what a step costs.
    return EngineSettings(policy=policy, enable_prefix_caching=False, has_costs=False)


def _short(found: Report) -> dict[str, Any]:
    return {
        "throughput": found.throughput, "attainment": found.attainment, "num_dropped": found.num_dropped,
        "ttft_p50": found.ttft.p50, "satisfaction": found.satisfaction, "num_loads": found.num_adapter_loads,
        "rows_per_step": found.rows_per_step, "num_preemptions": found.num_preemptions,
    }  # fmt: skip
