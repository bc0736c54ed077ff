"""Live requests with first tokens due in 0.3, 1 or 6 s: attainment by policy and load, and honest answers.

Log-normal prompts (median 665 tokens), 20 to 400 outputs, Poisson arrivals. The built-in H100
serves some 25 of them per second. An answer at arrival is right if it comes true, a promise is kept
if a request that was not refused met its deadlines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polybatch.config import ServiceLevels
from polybatch.request import Deadlines
from polybatch.simulate.cluster import simulate
from polybatch.simulate.engine import EngineSettings
from polybatch.simulate.machines import Machine
from polybatch.simulate.report import Report, report
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.arrivals import gamma_arrivals

NUM_REQUESTS = 1500
MEDIAN_PROMPT, SIGMA, LONGEST = 665, 0.9, 8192
DUE_S = (0.3, 1.0, 6.0)
LOADS, ANSWERED_LOADS = (20, 30, 40), (15, 25, 35)

POLICIES = {
    "fcfs": EngineSettings(policy="fcfs"),
    "edf": EngineSettings(policy="edf"),
    "shortest_first": EngineSettings(policy="shortest_first"),
    "deadline": EngineSettings(policy="deadline"),
    "deadline, abort": EngineSettings(policy="deadline", service=ServiceLevels(abort_late=True)),
}


def attainment(machine: Machine) -> dict[str, Any]:
    """Attainment of every policy at three loads, what is refused, and how often answers come true."""
    rows: list[dict[str, Any]] = []
    for load in LOADS:
        for name, settings in POLICIES.items():
            rows.append({"load": load, "policy": name, **_short(_run(machine, load, settings))})
    refusing = []
    for policy in ("fcfs", "deadline"):
        settings = EngineSettings(policy=policy, service=ServiceLevels(refuse_late=True))
        found = _run(machine, LOADS[-1], settings)
        served = 1 - found.num_refused / found.num_requests
        refusing.append(
            {"load": LOADS[-1], "policy": policy, "refused": 1 - served,
             "kept": (found.attainment or 0.0) / served}
        )  # fmt: skip
    answers = [
        {
            "load": load,
            "policy": policy,
            "right": _run(machine, load, EngineSettings(policy=policy)).answers_right,
        }
        for load in ANSWERED_LOADS
        for policy in ("fcfs", "deadline")
    ]
    best = {
        load: max(
            row["attainment"] for row in rows if row["load"] == load and "deadline" not in row["policy"]
        )
        for load in LOADS
    }
    return {
        "claim": "deadline attains at least what first come, earliest deadline and shortest first do",
        # Half a percent is a handful of requests.
        "holds": all(
            row["attainment"] >= best[row["load"]] - 0.005 for row in rows if "deadline" in row["policy"]
        ),
        "rows": rows,
        "refusing": refusing,
        "answers": answers,
    }


def _run(machine: Machine, rate: float, settings: EngineSettings) -> Report:
    return report(simulate(_trace(rate), machine, settings))


def _trace(rate: float) -> Trace:
    rng = np.random.RandomState(11)
    prompts = np.minimum(rng.lognormal(np.log(MEDIAN_PROMPT), SIGMA, NUM_REQUESTS), LONGEST).astype(int)
    outputs = rng.randint(20, 401, NUM_REQUESTS)
    due = rng.choice(DUE_S, NUM_REQUESTS)
    times = gamma_arrivals(rng, NUM_REQUESTS, rate)
    return Trace(
        f"{rate} requests/s",
        tuple(
            TraceRequest(
                request_id=f"live-{i}", arrival_s=float(times[i]), num_input=max(1, int(prompts[i])),
                num_output=int(outputs[i]), deadlines=Deadlines(ttft_s=float(due[i])),
            )
            for i in range(NUM_REQUESTS)
        ),
    )  # fmt: skip


def _short(found: Report) -> dict[str, float | None]:
    return {
        "attainment": found.attainment, "throughput": found.throughput, "ttft_p50": found.ttft.p50,
        "ttft_p99": found.ttft.p99, "tbt_p99": found.tbt.p99, "answers_right": found.answers_right,
    }  # fmt: skip
