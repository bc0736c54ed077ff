"""S-LoRA's generator: many adapters, bursty arrivals. No torch.

All draws come from one seeded stream in the order adapters, inputs, outputs, gaps; gaps are those of one
global Gamma process, not of one per adapter. An adapter's index is int(n U) with U ~ Power(alpha), density
alpha u^(alpha - 1): alpha = 1 is uniform, and smaller is more skewed. The most popular tenth of adapters gets
0.1^alpha of the requests.
Source: S-LoRA (Sheng et al. 2024), synthetic workloads.
"""

from __future__ import annotations

import numpy as np

from polybatch.errors import ConfigError
from polybatch.request import Deadlines
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.arrivals import gamma_arrivals

RANKS = {"S1": (8,), "S2": (64, 32, 16, 8), "S3": (16,), "S4": (64, 32, 16), "S5": (32,), "S6": (64,)}
"""Ranks by the paper's setting, given to adapters in turn."""

FIRST_TOKEN_S = 6.0


def slora(
    *,
    seed: int = 42,
    rate: float = 2.0,
    duration_s: float = 300.0,
    num_adapters: int = 200,
    alpha: float = 1.0,
    cv: float = 1.0,
    ranks: tuple[int, ...] = RANKS["S2"],
    low: int = 8,
    high: int = 512,
    ttft_s: float = FIRST_TOKEN_S,
) -> Trace:
    """int(rate * duration_s) requests; inputs and outputs uniform in [low, high) tokens.

    ttft_s: deadline of the first token. Raises ConfigError for a parameter out of range.
    """
    for name, value in (("duration_s", duration_s), ("num_adapters", num_adapters), ("alpha", alpha)):
        if not value > 0:
            raise ConfigError(f"{name} is {value}; it must be a positive number")
    if not 0 < low < high:
        raise ConfigError(f"lengths are from {low} to below {high}; both must be positive and in order")
    rng = np.random.RandomState(seed)
    num = int(rate * duration_s)
    indices = (rng.power(alpha, num) * num_adapters).astype(int)
    inputs, outputs = rng.randint(low, high, num), rng.randint(low, high, num)
    times = gamma_arrivals(rng, num, rate, cv)
    names = [f"adapter-{i}" for i in range(num_adapters)]
    deadlines = Deadlines(ttft_s=ttft_s)
    requests = tuple(
        TraceRequest(
            request_id=f"slora-{i}",
            arrival_s=float(times[i]),
            num_input=int(inputs[i]),
            num_output=int(outputs[i]),
            adapter=names[indices[i]],
            deadlines=deadlines,
        )
        for i in range(num)
    )
    return Trace("slora", requests, {name: ranks[i % len(ranks)] for i, name in enumerate(names)})
