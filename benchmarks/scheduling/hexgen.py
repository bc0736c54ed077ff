"""HexGen-Text2SQL's claim: urgency and dispatch each lower the deadline that can be kept, and both more.

Four engines, two of them half as fast. The number compared is the smallest multiple of the base time at which
95 % of questions end in time, to a fortieth; the base is the mean time of a standard workflow on this mix.
Traces are as long as the paper's and come, as there, faster than they can be served, so scales are above 1:
where nothing has to wait, no order is better than another. Mean times of stages are known, as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

from polybatch.scheduling.costs import COEFFICIENTS, CostModel
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.traces import Trace
from polybatch.simulate.workloads.hexgen import CALLS, STANDARD, hexgen

SHARE = 0.95
WAYS = {
    "full": ("hexgen", "deadline"),
    "dispatch only": ("hexgen", "fcfs"),
    "urgency only": ("round-robin", "deadline"),
    "neither": ("round-robin", "fcfs"),
}
QUESTIONS = (90, 96, 110)
"""Per trace; its seed is its place."""
LOAD = 2.0
LEAST = 0.5
STEP = 1.025


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
    # Three fast engines' worth of prompts; the slow ones count half.
    rate = LOAD * 3 / work_s
    rows: list[dict[str, Any]] = []
    orders: dict[str, bool] = {}
    for seed, num in enumerate(QUESTIONS, 1):
        source = partial(hexgen, seed=seed, num_questions=num, rate=rate, base_s=base_s)
        scales = {name: _smallest(machines, way, source, base_s, times) for name, way in WAYS.items()}
        rows.append({"seed": seed, "num_questions": num, "scales": scales})
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


def _smallest(
    machines: list[Machine],
    way: tuple[str, str],
    source: Callable[..., Trace],
    base_s: float,
    times: dict[str, float],
) -> float:
    """Found from below for `deadline`, which works towards the scale; first come does not see it."""
    router, policy = way
    settings = EngineSettings(policy=policy, has_costs=policy == "deadline", stage_times=tuple(times.items()))

    def ends(scale: float) -> float:
        """The multiple of the base within which 95 % of questions ended."""
        trace = source(slo_scale=scale)
        last: dict[str, float] = {}
        for outcome in simulate(trace, machines, settings, router=router).outcomes:
            stage, end = outcome.request.workflow, outcome.finished_s
            assert stage is not None
            assert end is not None
            took = (end - outcome.request.arrival_s) / base_s
            last[stage.workflow_id] = max(took, last.get(stage.workflow_id, 0.0))
        return sorted(last.values())[math.ceil(SHARE * len(last)) - 1]

    if policy != "deadline":
        return ends(1.0)
    # Who is due later is served later: from below, the first scale that is kept is the smallest.
    scale = ends(LEAST)
    while (took := ends(scale)) > scale:
        scale = max(took, STEP * scale)
    return scale
