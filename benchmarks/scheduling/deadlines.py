"""Deadlines under overload: the policy `deadline` against first come, earliest deadline and shortest first.

Three classes in equal parts: live requests (first token within 6 s, then 100 ms per token), and two that want
their last token within 60 and 180 s. Chats of Sarathi-Serve's lengths come for two minutes at up to three
times what the machine can do. Source: the deadline branch of Sarathi-Serve, with its batch classes' times
divided by ten. `on_traces` takes Azure's and Mooncake's traces instead, where they lie beside the checkout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from polybatch.request import Deadlines
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.readers import read_trace
from polybatch.simulate.report import meets, report
from polybatch.simulate.traces import Trace
from polybatch.simulate.workloads.sarathi import sarathi

CLASSES = (Deadlines(ttft_s=6.0, tpot_s=0.1), Deadlines(e2e_s=60.0), Deadlines(e2e_s=180.0))
BASELINES = ("fcfs", "edf", "shortest_first")
CLAIM = "deadline attainment is at least that of first come, earliest deadline and shortest first"
LOADS = (1.0, 1.6, 2.2, 3.0)
DURATION_S = 120.0

DATA = Path(__file__).parents[3] / "shared" / "data"
TRACES = {"azure_llm_code_2023.csv": 1500, "mooncake_conversation_first_half.jsonl": 300}
"""Requests taken of each, from its beginning."""
TRACE_LOADS = (1.6, 2.5)


def overload(machine: Machine) -> dict[str, Any]:
    """Attainment by policy and load; a load of 1 is the throughput with everything there at once."""
    probe = sarathi(num_requests=400, seed=3)
    capacity = _capacity(probe, machine)
    rows: list[dict[str, Any]] = []
    orders = _compare(LOADS, lambda load: _trace(capacity * load), machine, rows)
    return {
        "claim": CLAIM,
        "holds": all(orders.values()),
        "orderings": orders,
        "capacity": capacity,
        "rows": rows,
    }


def on_traces(machine: Machine) -> dict[str, Any]:
    """The same with arrivals and lengths of services, squeezed to a multiple of what the machine can do."""
    rows: list[dict[str, Any]] = []
    orders: dict[str, bool] = {}
    capacities: dict[str, float] = {}
    for file, num in TRACES.items():
        source = read_trace(DATA / file).head(num)
        # Requests are told apart by class alone here: prefixes would be a second reason to wait or not.
        plain = source.with_requests(
            replace(r, blocks=(), deadlines=CLASSES[i % 3]) for i, r in enumerate(source.requests)
        )
        capacities[file] = capacity = _capacity(plain, machine)
        found = _compare(TRACE_LOADS, lambda load: plain.at_rate(capacity * load), machine, rows)  # noqa: B023
        orders |= {f"{plain.name}, {name}": good for name, good in found.items()}
    return {
        "claim": CLAIM,
        "holds": all(orders.values()),
        "orderings": orders,
        "capacity": capacities,
        "rows": rows,
    }


def _capacity(trace: Trace, machine: Machine) -> float:
    at_once = trace.with_requests(replace(r, arrival_s=0.0, deadlines=None) for r in trace.requests)
    return report(simulate(at_once, machine, _settings("fcfs"))).throughput


def _compare(
    loads: Sequence[float], make: Callable[[float], Trace], machine: Machine, rows: list[dict[str, Any]]
) -> dict[str, bool]:
    """Whether `deadline` is at least as good as each baseline, by load; all numbers go to `rows`."""
    orders: dict[str, bool] = {}
    for load in loads:
        trace = make(load)
        found: dict[str, float] = {}
        for policy in (*BASELINES, "deadline"):
            run = simulate(trace, machine, _settings(policy))
            total = report(run)
            found[policy] = total.attainment or 0.0
            by_class = [[meets(o, None) for o in run.outcomes[i::3]] for i in range(3)]
            rows.append(
                {"trace": trace.name, "load": load, "policy": policy, "attainment": found[policy],
                 "attainment_by_class": [sum(c) / len(c) for c in by_class],
                 "throughput": total.throughput, "ttft_p50": total.ttft.p50,
                 "answers_right": total.answers_right}
            )  # fmt: skip
        # Differences of half a percent are a handful of requests.
        orders[f"load={load:g}"] = found["deadline"] >= max(found[name] for name in BASELINES) - 0.005
    return orders


def _trace(rate: float) -> Trace:
    trace = sarathi(num_requests=int(rate * DURATION_S), rate=rate, seed=4)
    return trace.with_requests(replace(r, deadlines=CLASSES[i % 3]) for i, r in enumerate(trace.requests))


def _settings(policy: str) -> EngineSettings:
    return EngineSettings(policy=policy, enable_prefix_caching=False, has_costs=policy == "deadline")
