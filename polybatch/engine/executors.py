"""Which executor runs the plans: a name -> how to size its pages and how to build it.

Imported only when chosen, because compiling kernels takes time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from polybatch.config import ModelSpec
from polybatch.engine.config import (
    CUDA_SCORED_TOKENS,
    PAGE_SIZE,
    EngineConfig,
    ResolvedConfig,
    available_memory,
    check_executor,
    executor_name,
    prefill_tokens,
    resolve,
    resolve_dtype,
)
from polybatch.errors import ConfigError
from polybatch.execution.executor import Executor
from polybatch.models.weights import ModelWeights


def settle(config: EngineConfig, spec: ModelSpec, adapter_bytes: int = 0) -> ResolvedConfig:
    """`resolve` for this machine: its devices, and the memory that is free on the one chosen.

    Raises ConfigError for a GPU that is not there, or too small for the model.
    """
    if config.device == "auto":
        wants_cuda = config.executor == "cuda" or (config.executor == "auto" and _has_cuda())
        config = replace(config, device="cuda" if wants_cuda else "cpu")
    if config.device.startswith("cuda") and not _has_cuda():
        raise ConfigError(
            "device is 'cuda', but torch finds no GPU: use device='cpu', executor='cpu' or 'auto'"
        )
    check_executor(config)
    if executor_name(config) == "cuda":
        from polybatch.execution.cuda_memory import pool_bytes
        from polybatch.execution.ranks import RESERVE_BYTES
        from polybatch.execution.sharding import shard_spec

        _check_devices(config)
        max_len = min(config.max_model_len or spec.max_position, spec.max_position)
        available = pool_bytes(
            shard_spec(spec, config.tensor_parallel_size), resolve_dtype(config), config.quantization,
            config.device,
            max_num_tokens=prefill_tokens(config) + config.max_num_seqs, max_num_seqs=config.max_num_seqs,
            max_num_logits=CUDA_SCORED_TOKENS + config.max_num_seqs, max_model_len=max_len,
            utilization=config.gpu_memory_utilization,
        )  # fmt: skip
        if config.tensor_parallel_size > 1:
            available = max(0, available - RESERVE_BYTES)
    else:
        available = available_memory()
    return resolve(config, spec, page_bytes(config, spec), available, adapter_bytes)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_devices(config: EngineConfig) -> None:
    """Raise ConfigError where there are fewer GPUs than are to share the model."""
    import torch

    first, size = int(config.device.partition(":")[2] or 0), config.tensor_parallel_size
    if first + size > torch.cuda.device_count():
        raise ConfigError(
            f"tensor_parallel_size is {size} from device {config.device!r} on, but this host shows "
            f"{torch.cuda.device_count()} GPUs: lower it, or see CUDA_VISIBLE_DEVICES"
        )


def page_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """Bytes of one page in one layer of one device, as the executor of this configuration lays it out."""
    if executor_name(config) in ("eager", "cuda"):
        from polybatch.execution.page_memory import page_bytes as plain_page_bytes
        from polybatch.execution.sharding import row_spec, shard_spec

        size = config.tensor_parallel_size if executor_name(config) == "cuda" else 1
        spec = row_spec(shard_spec(spec, size), size)
        return plain_page_bytes(spec, PAGE_SIZE, resolve_dtype(config))
    from polybatch.execution.cpu import page_bytes as cpu_page_bytes

    return cpu_page_bytes(spec, PAGE_SIZE, resolve_dtype(config))


def build_executor(
    weights: ModelWeights,
    config: ResolvedConfig,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    model: str | None = None,
) -> Executor:
    """Load the weights into an executor with a page pool. progress: see `CudaExecutor`.

    model: what other processes open the same weights by; needed where several GPUs share them.
    """
    settings: dict[str, Any] = {
        "dtype": config.dtype,
        "quantization": config.quantization,
        "num_pages": config.pool.num_pages,
        "page_size": config.pool.page_size,
        "max_num_tokens": config.max_num_tokens,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_model_len": config.scheduler.max_model_len,
        "threads": config.threads,
    }
    if config.executor == "eager":
        from polybatch.execution.eager import EagerExecutor

        return EagerExecutor(weights, **settings, device=config.device)
    if config.executor == "cuda":
        from polybatch.execution.cuda import CudaExecutor

        settings |= {"device": config.device, "max_num_logits": config.max_num_logits, "progress": progress}
        if config.tensor_parallel_size > 1:
            from polybatch.execution.parallel import ParallelExecutor

            if model is None:
                raise ConfigError(
                    f"tensor_parallel_size is {config.tensor_parallel_size}; it needs a model that other "
                    "processes can open: give its name or path"
                )
            return ParallelExecutor(weights, model=model, size=config.tensor_parallel_size, **settings)
        return CudaExecutor(weights, **settings)
    from polybatch.execution.cpu import CpuExecutor

    return CpuExecutor(weights, **settings)
