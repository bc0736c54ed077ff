"""DistServe's workloads: chat, code completion and summarisation with limits on TTFT and TPOT. No torch.

Lengths are log-normal with the means of the paper's figure and cut where its scripts cut; the shape is ours.
Source: DistServe (Zhong et al. 2024), section 6.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polybatch.errors import ConfigError
from polybatch.request import Deadlines
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.arrivals import gamma_arrivals, lengths_by_mean


@dataclass(frozen=True, slots=True)
class Task:
    """Mean lengths, their spread (of the logarithm), and the largest prompt and sum, in tokens."""

    prompt: float
    output: float
    spread: float
    max_prompt: int
    max_total: int


TASKS = {
    "chat": Task(755.5, 200.3, 0.8, 2040, 2048),
    "code": Task(171.3, 98.2, 0.5, 1024, 2048),
    "summarisation": Task(1738.3, 90.7, 0.3, 2040, 2132),
}
LIMITS = {"13b": (0.25, 0.1), "66b": (0.4, 0.1), "175b": (4.0, 0.2)}
"""TTFT and TPOT in seconds, by the size of the model."""


def distserve(
    *,
    seed: int = 42,
    rate: float = 4.0,
    num_requests: int = 1000,
    task: str = "chat",
    model: str = "13b",
    slo_scale: float = 1.0,
) -> Trace:
    """num_requests at Poisson times. task: chat, code or summarisation. model: whose limits."""
    if task not in TASKS:
        raise ConfigError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if model not in LIMITS:
        raise ConfigError(f"model is {model!r}; it must be one of {', '.join(LIMITS)}")
    kind = TASKS[task]
    rng = np.random.RandomState(seed)
    prompts = lengths_by_mean(rng, num_requests, kind.prompt, kind.spread, kind.max_prompt)
    outputs = lengths_by_mean(rng, num_requests, kind.output, kind.spread, kind.max_total - prompts)
    times = gamma_arrivals(rng, num_requests, rate)
    ttft_s, tpot_s = LIMITS[model]
    deadlines = Deadlines(ttft_s=ttft_s * slo_scale, tpot_s=tpot_s * slo_scale)
    return Trace(
        f"distserve-{task}",
        tuple(
            TraceRequest(
                request_id=f"distserve-{i}",
                arrival_s=float(times[i]),
                num_input=int(prompts[i]),
                num_output=int(outputs[i]),
                deadlines=deadlines,
            )
            for i in range(num_requests)
        ),
    )
