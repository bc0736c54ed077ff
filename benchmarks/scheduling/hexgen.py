"""HexGen-Text2SQL's claim: urgency and dispatch each lower the deadline that can be kept, and both more.

Four engines, two of them half as fast. The number compared is the smallest multiple of the base time at which
95 % of questions end in time, to a fortieth; the base is the mean time of a standard workflow on this mix.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

from polybatch.scheduling.costs import COEFFICIENTS, CostModel
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import report
from polybatch.simulate.workloads.hexgen import CALLS, STANDARD, hexgen

SHARE = 0.95
WAYS = {
    "full": ("hexgen", "deadline"),
    "dispatch only": ("hexgen", "fcfs"),
    "urgency only": ("round-robin", "deadline"),
    "neither": ("round-robin", "fcfs"),
}
NUM_QUESTIONS = 100
LOAD = 0.7


def slow(machine: Machine, factor: float = 2.0) -> Machine:
    """The same machine with every step so many times as long."""
    costs = machine.costs
    assert isinstance(costs, CostModel)
    slower = replace(costs, **{name: getattr(costs, name) * factor for name in COEFFICIENTS})
    return replace(machine, name=f"{machine.name}/{factor:g}", costs=slower)


def slo_scale(machine: Machine) -> dict[str, Any]:
    """The smallest scale that each combination of router and policy keeps, on three traces."""
    machine = replace(machine, max_num_seqs=16)
    machines = [machine, slow(machine), machine, slow(machine)]
    times = {
        name: sum(m.request_s(c.prompt, c.output) for m in machines) / len(machines)
        for name, c in CALLS.items()
    }
    base_s = sum(times[name] for name in STANDARD)
    work_s = sum(machine.prefill_s(CALLS[name].prompt) + CALLS[name].output * 0.001 for name in STANDARD)
    # Prefill decides: three machines' worth of it in four engines, two of which are half as fast.
    rate = LOAD * 3 / work_s
    rows: list[dict[str, Any]] = []
    orders: dict[str, bool] = {}
    for seed in (1, 2, 3):
        scales = {name: _smallest(machines, way, seed, rate, base_s) for name, way in WAYS.items()}
        rows.append({"seed": seed, "scales": scales})
        ordered = list(scales.values())
        orders[f"trace {seed}"] = all(a <= b for a, b in pairwise(ordered))
    return {
        "claim": "smallest SLO scale: full, dispatch only, urgency only, neither, in this order",
        "holds": all(orders.values()),
        "orderings": orders,
        "base_s": base_s,
        "rate": rate,
        "rows": rows,
    }


def _smallest(machines: list[Machine], way: tuple[str, str], seed: int, rate: float, base_s: float) -> float:
    router, policy = way
    low, high = 0.0, 1.0
    while high < 1024 and not _is_kept(machines, router, policy, seed, rate, base_s, high):
        low, high = high, 2 * high
    while high - low > high / 40:
        middle = (low + high) / 2
        if _is_kept(machines, router, policy, seed, rate, base_s, middle):
            high = middle
        else:
            low = middle
    return high


def _is_kept(
    machines: list[Machine], router: str, policy: str, seed: int, rate: float, base_s: float, scale: float
) -> bool:
    trace = hexgen(seed=seed, rate=rate, num_questions=NUM_QUESTIONS, slo_scale=scale, base_s=base_s)
    settings = EngineSettings(policy=policy, has_costs=policy == "deadline")
    found = report(simulate(trace, machines, settings, router=router)).workflow_attainment
    return found is not None and found >= SHARE
