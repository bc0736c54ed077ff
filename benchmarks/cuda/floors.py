"""The least time of a workload on a card: arithmetic of prefill, and bytes of every decode step. No torch.

Two limits stand beside each figure. The *floor* is physical: multiply-adds over the measured matmul rate for
prompts, and for each decode step the larger of that and bytes over read bandwidth (weights once, every row's
KV once, every live adapter once, a prefix in common once). The *practical floor* takes, instead of the bytes
of the weights, the time that the vendor's library needs for all linear layers and the head at that batch.
Norms, sampling, launches and Python count as nothing in both.

Unlike `polybatch.bench.roofline.bound`, which takes the larger of a run's two sums, prompts and decode steps
are added up: with these sizes they are different steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from polybatch.bench import roofline
from polybatch.bench.roofline import Limits, Precision
from polybatch.bench.workloads import Workload
from polybatch.config import ModelSpec

ADAPTER_BYTES = 2
"""Of one adapter weight: they are served in 16 bits."""

PRECISIONS = {
    "bfloat16": roofline.PRECISIONS["bfloat16"],
    "float32": roofline.PRECISIONS["float32"],
    # 16-bit scales for groups of 128, the head in 16 bits; products are taken in 16 bits.
    "int4": Precision(0.5 + 2 / 128, 2, "bfloat16"),
}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a card was seen to do, in this run.

    limits: read bandwidth in GB/s and matmul GFLOP/s by type. linears_ms: batch -> milliseconds of all linear
    layers and the head in 16 bits through torch, as one CUDA graph over all layers' own weights.
    """

    limits: Limits
    linears_ms: Mapping[int, float]

    @property
    def bytes_per_s(self) -> float:
        return self.limits.read_gbs * 1e9

    def linears_s(self, batch: int) -> float:
        """Seconds at any batch: on the line between the batches measured, beyond the last in proportion."""
        sizes = sorted(self.linears_ms)
        place = bisect_left(sizes, batch)
        if place == len(sizes):
            return self.linears_ms[sizes[-1]] / 1000 * batch / sizes[-1]
        if place == 0:
            return self.linears_ms[sizes[0]] / 1000
        low, high = sizes[place - 1], sizes[place]
        share = (batch - low) / (high - low)
        return (self.linears_ms[low] * (1 - share) + self.linears_ms[high] * share) / 1000


@dataclass(frozen=True, slots=True)
class Floor:
    """Least seconds. practical_s: None where the library has no such linear layers (int4)."""

    floor_s: float
    practical_s: float | None

    def per_s(self, count: int) -> tuple[float, float | None]:
        """`count` things in that time, as most per second."""
        return count / self.floor_s, None if self.practical_s is None else count / self.practical_s


def adapter_bytes(spec: ModelSpec, rank: int) -> int:
    """Bytes of a LoRA of this rank on all linear layers."""
    return ADAPTER_BYTES * roofline.adapter_weights(spec, rank)


def step_floor(
    spec: ModelSpec,
    ceilings: Ceilings,
    precision: str,
    batch: int,
    kv_tokens: float,
    live_adapter_bytes: int = 0,
) -> Floor:
    """A decode step of `batch` rows that attend to kv_tokens distinct tokens of KV together."""
    kind = PRECISIONS[precision]
    layers, head = roofline.layer_weights(spec), spec.vocab_size * spec.hidden_size
    weights_s = (layers * kind.layer_bytes + head * kind.head_bytes) / ceilings.bytes_per_s
    rest = kv_tokens * roofline.kv_bytes_per_token(spec) + live_adapter_bytes
    rest_s = rest / ceilings.bytes_per_s
    compute_s = 2 * batch * (layers + head) / (ceilings.limits.gflops[kind.rate] * 1e9)
    practical_s = ceilings.linears_s(batch) + rest_s if precision == "bfloat16" else None
    return Floor(max(weights_s + rest_s, compute_s), practical_s)


def workload_floor(spec: ModelSpec, ceilings: Ceilings, precision: str, workload: Workload) -> Floor:
    """All prompts, then all decode steps with every request in each; output lengths must be equal."""
    requests, shared = workload.requests, workload.shared_prefix_tokens
    (output_tokens,) = {request.max_tokens for request in requests}
    prompts = replace(workload, requests=tuple(replace(request, max_tokens=1) for request in requests))
    prefill_s = roofline.bound(spec, prompts, PRECISIONS[precision], ceilings.limits).compute_s
    own = sum(len(request.token_ids) - shared for request in requests)
    ranks = {request.adapter: workload.adapters[request.adapter] for request in requests if request.adapter}
    live_bytes = sum(adapter_bytes(spec, rank) for rank in ranks.values())
    floor_s, practical_s = prefill_s, prefill_s
    is_practical = precision == "bfloat16"
    for step in range(1, output_tokens):
        kv_tokens = shared + own + step * len(requests)
        floor = step_floor(spec, ceilings, precision, len(requests), kv_tokens, live_bytes)
        floor_s += floor.floor_s
        practical_s += floor.practical_s or 0.0
    return Floor(floor_s, practical_s if is_practical else None)


def decode_floor(
    spec: ModelSpec, ceilings: Ceilings, precision: str, shorter: Workload, longer: Workload
) -> Floor:
    """The mean decode step among those that the longer of two runs has more."""
    less, more = (workload_floor(spec, ceilings, precision, w) for w in (shorter, longer))
    steps = longer.requests[0].max_tokens - shorter.requests[0].max_tokens
    practical_s = None
    if less.practical_s is not None and more.practical_s is not None:
        practical_s = (more.practical_s - less.practical_s) / steps
    return Floor((more.floor_s - less.floor_s) / steps, practical_s)
