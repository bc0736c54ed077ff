"""What the user may set, and the pure function that turns every "auto" into a value.

`EngineConfig` is what was asked. `resolve` looks at the model and the machine's memory once and
returns a `ResolvedConfig`, in which nothing is left to choose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polybatch.config import (
    CUDA_DTYPES,
    CUDA_QUANTIZATIONS,
    DTYPES,
    QUANTIZATIONS,
    ModelSpec,
    PoolSpec,
    SchedulerConfig,
    ServiceLevels,
)
from polybatch.errors import ConfigError

PAGE_SIZE = 16
MEMORY_SHARE = 0.25
"""Of the available memory, what the page pool may take unless told."""

CACHE_SHARE = 0.5
"""Of a pool whose size was left to the engine, what idle prefixes may fill; the rest waits for sequences."""

PREFILL_TOKENS = {"cuda": 8192}
"""Prefill tokens per step unless told, by executor: what a GPU needs to be busy."""

OTHER_PREFILL_TOKENS = 2048

CUDA_SCORED_TOKENS = 1024
"""Rows of logits a GPU keeps room for beside those of its sequences."""

ADAPTER_MARGIN = 1.25
"""Over the file's bytes, for the tails of pages."""
_UNITS = {"B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for kind, base in (("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of an engine as the user wrote them.

    dtype: of activations and KV: "auto", "float32", "bfloat16" or, on CUDA, "float16".
    device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
    quantization: of the linear weights: None; on the CPU "int8" or "int4", on CUDA "int4" (groups of 128
        inputs), "int4-channel" (a scale per output) or "fp8".
    max_model_len: prompt + output in tokens; None is the model's own limit, or what memory holds.
    memory: of the page pool (KV and adapters): bytes or text such as "2GiB"; None is a quarter of
        the available memory, or what max_num_seqs sequences of max_model_len can fill if that is less, and
        takes memory for more than half of it only while running sequences need it.
    max_num_batched_tokens: prefill tokens per step. max_num_seqs: sequences that run at once.
    gpu_memory_utilization: instead of memory, the share of a GPU's memory that weights, buffers and pages may
        take together; None is all that is free.
    policy: one of `polybatch.scheduling.policies.POLICIES`. service, adapter_cluster: as in
        `SchedulerConfig`; stage_times too, as a map.
    executor: "auto", "cpu" (compiled) or "eager" (the torch reference).
    threads: of the executor; None is one per processor that this process may use.
    tensor_parallel_size: GPUs of this host that share the model, from `device` on.
    seed: for requests without their own.

    Raises ConfigError where a value cannot work on its own.
    """

    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    memory: int | str | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    enable_prefix_caching: bool = True
    seed: int = 0
    policy: str = "fcfs"
    service: ServiceLevels = field(default_factory=ServiceLevels)
    adapter_cluster: int | None = None
    stage_times: Mapping[str, float] = field(default_factory=dict)
    executor: str = "auto"
    threads: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, ("auto", *CUDA_DTYPES))
        _check_choice("executor", self.executor, ("auto", "cpu", "cuda", "eager"))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device is {self.device!r}; it must be auto, cpu, cuda or cuda:N")
        kind = self.device.partition(":")[0]
        if self.executor in ("cpu", "cuda") and kind not in ("auto", self.executor):
            raise ConfigError(
                f"executor is {self.executor!r} and device {self.device!r}: leave one of them out"
            )
        _check_choice("quantization", self.quantization, (*QUANTIZATIONS, *CUDA_QUANTIZATIONS[2:]))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed is {self.seed!r}; it must be an integer")
        if self.threads is not None and (not isinstance(self.threads, int) or self.threads < 1):
            raise ConfigError(f"threads is {self.threads!r}; it must be a positive integer or None")
        for name in ("max_model_len", "max_num_batched_tokens", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {value!r}; it must be a positive integer")
        size = self.tensor_parallel_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"tensor_parallel_size is {size!r}; it must be a positive number of GPUs")
        if self.memory is not None:
            parse_bytes(self.memory)
        self._check_utilization()

    def _check_utilization(self) -> None:
        share = self.gpu_memory_utilization
        if share is None:
            return
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share!r}; it must be above 0 and at most 1")
        if self.memory is not None:
            raise ConfigError(
                f"gpu_memory_utilization is {share:g} and memory is {self.memory!r}: give one of them"
            )


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """Settings with nothing left to choose.

    max_num_logits: rows of logits that a step can have.
    """

    dtype: str
    device: str
    quantization: str | None
    executor: str
    threads: int | None
    seed: int
    pool: PoolSpec
    scheduler: SchedulerConfig
    tensor_parallel_size: int = 1

    @property
    def max_num_tokens(self) -> int:
        """Most tokens that one step can hold: decodes come on top of the prefill budget."""
        return self.scheduler.max_num_batched_tokens + self.scheduler.max_num_seqs

    @property
    def max_num_logits(self) -> int:
        scored = self.scheduler.max_scored_tokens
        return self.max_num_tokens if scored is None else scored + self.scheduler.max_num_seqs


def resolve(
    config: EngineConfig, spec: ModelSpec, page_bytes: int, available_bytes: int, adapter_bytes: int = 0
) -> ResolvedConfig:
    """Settle everything that was left to the engine.

    page_bytes: of one page in one layer, at the dtype that `resolve_dtype` gives.
    available_bytes: memory that is free on the machine. adapter_bytes: what the adapters known now would
    take; a pool sized for sequences alone would have them crowd each other out.
    Raises ConfigError for what the executor does not know, a pool that cannot hold one sequence or does not
    fit, and a max_model_len beyond the model's.
    """
    if config.max_model_len is not None and config.max_model_len > spec.max_position:
        raise ConfigError(
            f"max_model_len is {config.max_model_len:,}, the model's limit is {spec.max_position:,} "
            "positions: lower max_model_len"
        )
    wanted_len = config.max_model_len or spec.max_position
    check_executor(config)
    executor = executor_name(config)
    pages_per_seq = -(-wanted_len // PAGE_SIZE)
    all_layers = page_bytes * spec.num_layers
    if config.memory is None:
        wanted = pages_per_seq * config.max_num_seqs + -(-adapter_bytes // all_layers)
        num_pages = available_bytes // all_layers
        # A GPU's memory is taken once and for all; elsewhere pages that are never touched cost nothing.
        reserve_pages = 0
        if executor != "cuda":
            num_pages = min(int(MEMORY_SHARE * available_bytes) // all_layers, wanted)
            reserve_pages = int((1 - CACHE_SHARE) * num_pages)
    else:
        num_pages = parse_bytes(config.memory) // all_layers
        if num_pages * all_layers > available_bytes:
            room = (
                f"beside weights and buffers the GPU has room for pages of {available_bytes:,} bytes: lower "
                "memory, or leave it out to take all of that"
                if executor == "cuda"
                else f"only {available_bytes:,} bytes are free on this machine: lower memory"
            )
            raise ConfigError(f"memory is {config.memory!r}, but {room}")
        reserve_pages = 0
    if num_pages < 2:
        raise ConfigError(
            f"memory for the page pool is {num_pages} pages of {all_layers:,} bytes and {PAGE_SIZE} tokens "
            "each; two are the least: raise memory"
        )
    if config.max_model_len is not None and num_pages < pages_per_seq:
        raise ConfigError(
            f"memory for the page pool is {num_pages * all_layers:,} bytes, which hold "
            f"{num_pages * PAGE_SIZE:,} tokens; one sequence of max_model_len {wanted_len:,} needs "
            f"{pages_per_seq * all_layers:,} bytes: raise memory or lower max_model_len"
        )
    return ResolvedConfig(
        dtype=resolve_dtype(config),
        device=config.device if config.device != "auto" else "cuda" if executor == "cuda" else "cpu",
        quantization=config.quantization,
        executor=executor,
        threads=config.threads,
        seed=config.seed,
        pool=PoolSpec(num_pages, PAGE_SIZE, page_bytes, spec.num_layers),
        scheduler=SchedulerConfig(
            max_num_batched_tokens=prefill_tokens(config),
            max_num_seqs=config.max_num_seqs,
            max_model_len=min(wanted_len, num_pages * PAGE_SIZE),
            max_scored_tokens=CUDA_SCORED_TOKENS if executor == "cuda" else None,
            policy=config.policy,
            service=config.service,
            adapter_cluster=config.adapter_cluster,
            stage_times=tuple(config.stage_times.items()),
            enable_prefix_caching=config.enable_prefix_caching,
            reserve_pages=reserve_pages,
        ),
        tensor_parallel_size=config.tensor_parallel_size,
    )


def check_executor(config: EngineConfig) -> None:
    """Raise ConfigError for a setting that the executor chosen does not know."""
    executor = executor_name(config)
    if executor != "cuda" and config.dtype not in ("auto", *DTYPES):
        raise ConfigError(
            f"dtype is {config.dtype!r}; the {executor} executor knows {', '.join(DTYPES)}: use one of these "
            "or device 'cuda'"
        )
    known = CUDA_QUANTIZATIONS if executor == "cuda" else QUANTIZATIONS
    if config.quantization not in known:
        raise ConfigError(
            f"quantization is {config.quantization!r}; the {executor} executor knows "
            f"{', '.join(map(repr, known))}"
        )
    if config.tensor_parallel_size > 1 and executor != "cuda":
        raise ConfigError(
            f"tensor_parallel_size is {config.tensor_parallel_size}; the {executor} executor has one device: "
            "use it with device 'cuda', or leave it at 1"
        )
    if config.gpu_memory_utilization is not None and executor != "cuda":
        raise ConfigError(
            f"gpu_memory_utilization is {config.gpu_memory_utilization:g}, and the {executor} executor "
            "uses no GPU: leave it out, or give memory instead"
        )


def adapter_bytes(paths: Iterable[str | Path], dtype: str) -> int:
    """Bytes of the pool that these PEFT folders will take, a little generously, judged by their files' sizes.

    Folders without the file count nothing: registering them says what is wrong.
    """
    files = [Path(path) / "adapter_model.safetensors" for path in paths]
    stored = sum(file.stat().st_size for file in files if file.is_file())
    return int(ADAPTER_MARGIN * stored) * (2 if dtype == "float32" else 1)


def resolve_dtype(config: EngineConfig) -> str:
    """bfloat16 unless told: half the bytes, and the CPU multiplies it faster."""
    return "bfloat16" if config.dtype == "auto" else config.dtype


def executor_name(config: EngineConfig) -> str:
    """The executor of the device unless told; "auto" is the CPU here, see `engine.executors.settle`."""
    if config.executor != "auto":
        return config.executor
    return "cuda" if config.device.startswith("cuda") else "cpu"


def prefill_tokens(config: EngineConfig) -> int:
    """Prefill tokens per step."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    return PREFILL_TOKENS.get(executor_name(config), OTHER_PREFILL_TOKENS)


def parse_bytes(value: int | str) -> int:
    """Bytes of 4096, "4096", "1.5GiB" or "2GB" (1GB = 10**9, 1GiB = 2**30). Raises ConfigError."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?\s*", value)
        if match and (match[2] or "B") in _UNITS:
            return int(float(match[1]) * _UNITS[match[2] or "B"])
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigError(
        f"memory is {value!r}; it must be a positive number of bytes, or text such as '2GiB' or '500MB'"
    )


def available_memory() -> int:
    """Bytes that this process could still take: the machine's, or its container's if less."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        free = int(match[1]) * 1024 if match else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
