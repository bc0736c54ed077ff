"""What fits on a GPU, worked out before anything is loaded: weights, a step's buffers, the rest is pages.

Out of memory is then impossible once the engine runs, and reported with numbers before it does.
"""

from __future__ import annotations

import math

import torch

from polybatch.config import ModelSpec
from polybatch.errors import ConfigError
from polybatch.execution.cuda_model import FUSED, SPARE_OF, workspace_shapes
from polybatch.execution.page_memory import TORCH_DTYPES
from polybatch.kernels.linear.cuda import SCRATCH_BYTES
from polybatch.kernels.ragged_attention.cuda import choose_tiles
from polybatch.kernels.ragged_attention.work import Heads, make_limits

SHARE = 0.97
"""Of the memory that is free at start-up; the rest is for what other programs take meanwhile."""

RESERVE = 1 << 30
"""Bytes for libraries' workspaces, graphs, compiled kernels, adapters' staging and sampling."""

_BITS = {None: None, "int4": 4.5, "int4-channel": 4.25, "fp8": 8.25}


def pool_bytes(
    spec: ModelSpec,
    dtype: str,
    quantization: str | None,
    device: str,
    *,
    max_num_tokens: int,
    max_num_seqs: int,
    max_num_logits: int,
    max_model_len: int,
    utilization: float | None = None,
) -> int:
    """Bytes that the weights and buffers leave for pages. Arguments as of `CudaExecutor`.

    utilization: share of all the device's memory that this engine may take; None for most of what is free.
    Raises ConfigError if nothing is left, or so much is not free.
    """
    free, total = torch.cuda.mem_get_info(torch.device(device))
    usable = int(SHARE * free if utilization is None else utilization * total)
    gib = 2.0**30
    if usable > free:
        raise ConfigError(
            f"gpu_memory_utilization is {utilization:g}, {usable / gib:.1f} GiB of device {device}, of which "
            f"only {free / gib:.1f} GiB are free: lower it, or free memory on the device"
        )
    weights = weight_bytes(spec, dtype, quantization)
    num_sms = torch.cuda.get_device_properties(torch.device(device)).multi_processor_count
    step = step_bytes(
        spec, dtype, num_sms, max_num_tokens=max_num_tokens, max_num_seqs=max_num_seqs,
        max_num_logits=max_num_logits, max_model_len=max_model_len,
    )  # fmt: skip
    step += product_bytes(spec, quantization, max_num_tokens)
    left = usable - weights - step - RESERVE
    if left <= 0:
        allowed = "" if utilization is None else f", {usable / gib:.1f} of them by gpu_memory_utilization"
        raise ConfigError(
            f"device {device} has {free / gib:.1f} GiB free{allowed}; the weights take {weights / gib:.1f}, "
            f"a step of {max_num_tokens:,} tokens and {max_num_logits:,} rows of logits {step / gib:.1f} and "
            f"libraries {RESERVE / gib:.1f}, which leaves no room for pages: use a quantization, lower "
            "max_num_batched_tokens or max_num_seqs, or free memory on the device"
        )
    return left


def weight_bytes(spec: ModelSpec, dtype: str, quantization: str | None) -> int:
    """Bytes of the weights as `DeviceWeights` holds them, at most: several GPUs have no spare columns."""
    itemsize = TORCH_DTYPES[dtype].itemsize
    per_layer = sum(out * into for out, into in spec.linear_shapes.values())
    if quantization is None:
        for name, parts in FUSED.items():
            per_layer += SPARE_OF[name] * sum(spec.linear_shapes[f"{part}_proj"][0] for part in parts)
    bits = _BITS.get(quantization) or 8.0 * itemsize
    vocabulary = spec.vocab_size * spec.hidden_size * (1 if spec.tie_embeddings else 2)
    return int(spec.num_layers * per_layer * bits / 8) + vocabulary * itemsize


def product_bytes(spec: ModelSpec, quantization: str | None, max_num_tokens: int) -> int:
    """Bytes that packed products share: fp8's rounded inputs and its outputs, weights that int4 widens."""
    if quantization is None:
        return 0
    if quantization != "fp8":
        return SCRATCH_BYTES
    outs = [sum(spec.linear_shapes[f"{part}_proj"][0] for part in parts) for parts in FUSED.values()]
    ins = [into for _, into in spec.linear_shapes.values()]
    return max_num_tokens * (max(ins) + 4 + 2 * max(outs))


def step_bytes(
    spec: ModelSpec,
    dtype: str,
    num_sms: int,
    *,
    max_num_tokens: int,
    max_num_seqs: int,
    max_num_logits: int,
    max_model_len: int,
) -> int:
    """Bytes of the buffers that every step uses."""
    kind = TORCH_DTYPES[dtype]
    shapes = workspace_shapes(spec, max_num_tokens, max_num_logits, kind, has_spare=True)
    values = sum(math.prod(shape) * held.itemsize for shape, held in shapes.values())
    heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    scratch = 0
    for tokens in (max_num_tokens, max_num_seqs):
        limits = make_limits(
            heads, choose_tiles(heads, kind), max_tokens=tokens, max_seqs=max_num_seqs, num_sms=num_sms,
            max_group_tokens=min(tokens, max_num_seqs),
        )  # fmt: skip
        scratch += limits.max_partials * spec.num_heads * (spec.head_dim + 1) * 4
        scratch += limits.max_tokens * spec.num_heads * 4
    rope = (max_model_len + 1) * spec.head_dim * 4
    table = max_num_seqs * (max_model_len // 16 + 2) * 4
    return values + scratch + rope + table
