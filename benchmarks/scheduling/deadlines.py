"""Deadlines under overload: the policy `deadline` against first come, earliest deadline and shortest first.

Three classes in equal parts: live requests (first token within 6 s, then 100 ms per token), and two that want
their last token within 60 and 180 s. Chats of Sarathi-Serve's lengths come for two minutes at up to three
times what the machine can do. Source: the deadline branch of Sarathi-Serve, with its batch classes' times
divided by ten.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from polybatch.request import Deadlines
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import meets, report
from polybatch.simulate.traces import Trace
from polybatch.simulate.workloads.sarathi import sarathi

CLASSES = (Deadlines(ttft_s=6.0, tpot_s=0.1), Deadlines(e2e_s=60.0), Deadlines(e2e_s=180.0))
BASELINES = ("fcfs", "edf", "shortest_first")
LOADS = (1.0, 1.6, 2.2, 3.0)
DURATION_S = 120.0


def overload(machine: Machine) -> dict[str, Any]:
    """Attainment by policy and load; a load of 1 is the throughput with everything there at once."""
    probe = sarathi(num_requests=400, seed=3)
    at_once = probe.with_requests(replace(r, arrival_s=0.0) for r in probe.requests)
    capacity = report(simulate(at_once, machine, _settings("fcfs"))).throughput
    rows: list[dict[str, Any]] = []
    orders: dict[str, bool] = {}
    for load in LOADS:
        trace = _trace(capacity * load)
        found: dict[str, float] = {}
        for policy in (*BASELINES, "deadline"):
            run = simulate(trace, machine, _settings(policy))
            total = report(run)
            found[policy] = total.attainment or 0.0
            by_class = [[meets(o, None) for o in run.outcomes[i::3]] for i in range(3)]
            rows.append(
                {"load": load, "policy": policy, "attainment": found[policy],
                 "attainment_by_class": [sum(c) / len(c) for c in by_class],
                 "throughput": total.throughput, "ttft_p50": total.ttft.p50,
                 "answers_right": total.answers_right}
            )  # fmt: skip
        # Differences of half a percent are a handful of requests.
        orders[f"load={load:g}"] = found["deadline"] >= max(found[name] for name in BASELINES) - 0.005
    return {
        "claim": "deadline attainment is at least that of first come, earliest deadline and shortest first",
        "holds": all(orders.values()),
        "orderings": orders,
        "capacity": capacity,
        "rows": rows,
    }


def _trace(rate: float) -> Trace:
    trace = sarathi(num_requests=int(rate * DURATION_S), rate=rate, seed=4)
    return trace.with_requests(replace(r, deadlines=CLASSES[i % 3]) for i, r in enumerate(trace.requests))


def _settings(policy: str) -> EngineSettings:
    return EngineSettings(policy=policy, enable_prefix_caching=False, has_costs=policy == "deadline")
