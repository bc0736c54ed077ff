"""Which executor runs the plans: a name -> how to size its pages and how to build it.

Imported only when chosen, because compiling kernels takes time.
"""

from __future__ import annotations

from typing import Any

from polybatch.config import ModelSpec
from polybatch.engine.config import PAGE_SIZE, EngineConfig, ResolvedConfig, executor_name, resolve_dtype
from polybatch.execution.executor import Executor
from polybatch.models.weights import ModelWeights


def page_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """Bytes of one page in one layer, as the executor of this configuration lays it out."""
    if executor_name(config) == "eager":
        from polybatch.execution.page_memory import page_bytes as eager_page_bytes

        return eager_page_bytes(spec, PAGE_SIZE, resolve_dtype(config))
    from polybatch.execution.cpu import page_bytes as cpu_page_bytes

    return cpu_page_bytes(spec, PAGE_SIZE, resolve_dtype(config))


def build_executor(weights: ModelWeights, config: ResolvedConfig) -> Executor:
    """Load the weights into an executor with a page pool."""
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

        return EagerExecutor(weights, **settings)
    from polybatch.execution.cpu import CpuExecutor

    return CpuExecutor(weights, **settings)
