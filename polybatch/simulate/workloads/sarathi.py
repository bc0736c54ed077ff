"""Sarathi-Serve's workloads: chats and long documents at Poisson times, or synthetic lengths. No torch.

The two data sets are given by what the paper's table says of them: medians and 90th percentiles of prompts
and outputs, and the limit on the sum. Synthetic lengths are of prompt and output together, split 20 to 1.
Source: Sarathi-Serve (Agrawal et al. 2024), section 5 and its request generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polybatch.errors import ConfigError
from polybatch.simulate.traces import Trace, TraceRequest
from polybatch.simulate.workloads.arrivals import Ints, gamma_arrivals, lengths_by_quantiles

ZIPF_THETA = 0.6
PREFILL_TO_DECODE = 20


@dataclass(frozen=True, slots=True)
class DataSet:
    """Median and 90th percentile of prompts and outputs, and the largest sum, in tokens."""

    prompt: tuple[int, int]
    output: tuple[int, int]
    limit: int


DATA_SETS = {
    "sharegpt4": DataSet((1730, 5696), (415, 834), 8192),
    "arxiv": DataSet((7059, 12985), (208, 371), 16384),
}
SYNTHETIC = ("fixed", "uniform", "zipf")


def sarathi(
    *,
    seed: int = 42,
    rate: float = 1.0,
    num_requests: int = 2048,
    lengths: str = "sharegpt4",
    cv: float = 0.0,
    low: int = 1024,
    high: int = 4096,
) -> Trace:
    """num_requests requests.

    lengths: sharegpt4, arxiv, fixed (high tokens), uniform or zipf (from low to high tokens).
    cv: of the gaps; 0 takes the source's, 1 (Poisson) for the data sets and 0.5 for synthetic lengths.
    """
    rng = np.random.RandomState(seed)
    if lengths in DATA_SETS:
        prompts, outputs = _of_data_set(rng, num_requests, DATA_SETS[lengths])
    elif lengths in SYNTHETIC:
        if not PREFILL_TO_DECODE < low <= high:
            raise ConfigError(f"lengths are from {low} to {high}; they must be in order and above 20")
        total = _synthetic(rng, num_requests, lengths, low, high)
        outputs = np.maximum(1, total // (PREFILL_TO_DECODE + 1))
        prompts = total - outputs
    else:
        raise ConfigError(f"lengths is {lengths!r}; it must be one of {', '.join((*DATA_SETS, *SYNTHETIC))}")
    times = gamma_arrivals(rng, num_requests, rate, cv or (1.0 if lengths in DATA_SETS else 0.5))
    return Trace(
        f"sarathi-{lengths}",
        tuple(
            TraceRequest(
                request_id=f"sarathi-{i}",
                arrival_s=float(times[i]),
                num_input=int(prompts[i]),
                num_output=int(outputs[i]),
            )
            for i in range(num_requests)
        ),
    )


def _of_data_set(rng: np.random.RandomState, num: int, source: DataSet) -> tuple[Ints, Ints]:
    outputs = lengths_by_quantiles(rng, num, *source.output, largest=source.limit // 4)
    prompts = lengths_by_quantiles(rng, num, *source.prompt, largest=source.limit - 1)
    return prompts, np.maximum(1, np.minimum(outputs, source.limit - prompts))


def _synthetic(rng: np.random.RandomState, num: int, kind: str, low: int, high: int) -> Ints:
    if kind == "fixed":
        return np.full(num, high, dtype=np.int64)
    if kind == "uniform":
        return rng.randint(low, high + 1, num).astype(np.int64)
    weights = np.arange(1, high - low + 2, dtype=np.float64) ** -ZIPF_THETA
    return low + np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random_sample(num))
