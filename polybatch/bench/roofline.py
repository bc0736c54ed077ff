"""The least time that a workload can take on a machine: bytes over bandwidth or arithmetic over its rate.

Counts what any engine must do: every weight once per step, every KV entry once per token that attends to it,
two operations per weight and token. Activations, norms, sampling and all overhead count as nothing, so the
limit can be approached and never passed. Source: the roofline model (Williams et al. 2009). No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from polybatch.bench.workloads import BenchRequest, Workload
from polybatch.config import ModelSpec

KV_BYTES = 2


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes per weight of the layers and of the head, scales included, and the matmul rate that applies."""

    layer_bytes: float
    head_bytes: float
    rate: str


PRECISIONS = {
    "float32": Precision(4, 4, "float32"),
    "bfloat16": Precision(2, 2, "bfloat16"),
    "int8": Precision(1, 1, "int8"),
    "int4": Precision(0.5 + 2 / 32, 1, "int8"),
    "q8_0": Precision(34 / 32, 34 / 32, "int8"),
    "q4_0": Precision(18 / 32, 34 / 32, "int8"),
    "q4_1": Precision(20 / 32, 34 / 32, "int8"),
}
"""By the name that follows an engine's; int4 is taken with 16-bit scales for groups of 32."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a machine can do. read_gbs: GB/s from memory; gflops: matmul GFLOP/s by operand type."""

    read_gbs: float
    gflops: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Bound:
    """Least seconds by arithmetic and by memory, and what follows for the figures that a run reports.

    decode_tok_s and ttft_ms: of a single stream, else None.
    """

    compute_s: float
    memory_s: float
    total_s: float
    out_tok_s: float
    decode_tok_s: float | None = None
    ttft_ms: float | None = None


def layer_weights(spec: ModelSpec) -> int:
    return spec.num_layers * sum(out * width for out, width in spec.linear_shapes.values())


def adapter_weights(spec: ModelSpec, rank: int) -> int:
    """Weights of a LoRA of this rank on all linears."""
    return spec.num_layers * rank * sum(out + width for out, width in spec.linear_shapes.values())


def kv_bytes_per_token(spec: ModelSpec) -> int:
    return 2 * KV_BYTES * spec.num_layers * spec.kv_size


def bound(spec: ModelSpec, workload: Workload, precision: Precision, limits: Limits) -> Bound:
    """The limit of a workload at a precision; a shared prefix is computed once, all requests run at once."""
    rate = limits.gflops[precision.rate] * 1e9
    bandwidth = limits.read_gbs * 1e9
    weights = layer_weights(spec) * precision.layer_bytes
    weights += spec.vocab_size * spec.hidden_size * precision.head_bytes
    compute_s = _flops(spec, workload) / rate
    memory_s = (_weight_reads(spec, workload, weights) + _kv_reads(spec, workload)) / bandwidth
    total_s = max(compute_s, memory_s)
    if not workload.is_stream:
        return Bound(compute_s, memory_s, total_s, workload.num_output_tokens / total_s)
    request = workload.requests[0]
    context = len(request.token_ids) + request.max_tokens / 2
    decode_s = (weights + context * kv_bytes_per_token(spec)) / bandwidth
    first = BenchRequest(request.token_ids, 1, request.adapter)
    ttft_s = max(_flops(spec, Workload("", (first,), workload.adapters)) / rate, weights / bandwidth)
    return Bound(
        compute_s,
        memory_s,
        total_s,
        workload.num_output_tokens / total_s,
        decode_tok_s=1 / decode_s,
        ttft_ms=1000 * ttft_s,
    )


def _flops(spec: ModelSpec, workload: Workload) -> float:
    """Two per weight and token, four per query-key pair and dimension; the last token is never run."""
    shared = workload.shared_prefix_tokens
    per_token = 2 * layer_weights(spec)
    per_logit_row = 2 * spec.vocab_size * spec.hidden_size
    per_pair = 4 * spec.num_layers * spec.q_size
    flops = float(shared * per_token + per_pair * _pairs(0, shared))
    for request in workload.requests:
        end = len(request.token_ids) + request.max_tokens - 1
        own = end - shared
        rank = 0 if request.adapter is None else workload.adapters[request.adapter]
        flops += own * (per_token + 2 * adapter_weights(spec, rank))
        flops += request.max_tokens * per_logit_row + per_pair * _pairs(shared, end)
    return flops


def _pairs(start: int, end: int) -> int:
    """Query-key pairs of the tokens from start to end under a causal mask."""
    return (end * (end + 1) - start * (start + 1)) // 2


def _weight_reads(spec: ModelSpec, workload: Workload, weights: float) -> float:
    """The base once per step, every used adapter (16 bits) once per step of its longest request."""
    steps = max(request.max_tokens for request in workload.requests)
    used: Counter[str] = Counter()
    for request in workload.requests:
        if request.adapter is not None:
            used[request.adapter] = max(used[request.adapter], request.max_tokens)
    adapters = sum(n * 2 * adapter_weights(spec, workload.adapters[name]) for name, n in used.items())
    return steps * weights + adapters


def _kv_reads(spec: ModelSpec, workload: Workload) -> float:
    """Decode steps read each request's KV; a prefix in common is read once per step for all of them."""
    shared = workload.shared_prefix_tokens
    steps = max(request.max_tokens for request in workload.requests) - 1
    tokens = shared * steps
    for request in workload.requests:
        first = len(request.token_ids) + 1 - shared
        tokens += sum(range(first, first + request.max_tokens - 1))
    return tokens * kv_bytes_per_token(spec)
