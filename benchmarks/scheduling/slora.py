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
    """Throughput under saturation for 2 to 2,000 adapters of ranks 64, 32, 16, 8."""
    rate = 1.2 * saturated(machine, 2)
    rows: list[dict[str, Any]] = []
    for num in (1, 2, 5, 100, 200, 400, 1000, 2000):
        trace = slora(rate=rate, duration_s=120.0, num_adapters=num)
        found = report(simulate(trace, machine, _settings("fcfs")))
        rows.append({"num_adapters": num, "num_used": found.num_adapters, **_short(found)})
    by = {row["num_adapters"]: row["throughput"] for row in rows}
    ratios = {
        "400 over 100": by[400] / by[100],
        "2000 over 100": by[2000] / by[100],
        "100 over 2": by[100] / by[2],
    }
    return {
        "claim": "throughput with 400 adapters is at least 0.9 of that with 100",
        "holds": ratios["400 over 100"] >= 0.9,
        "ratios": ratios,
        "rate": rate,
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
