"""Where this machine keeps its cost profiles, and which of them an engine takes."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

from polybatch.engine.config import ResolvedConfig
from polybatch.errors import ConfigError
from polybatch.models.builtin import cache_dir
from polybatch.scheduling.cost_profile import CostKey, CostProfile, load_profile
from polybatch.scheduling.online_cost import OnlineCost

logger = logging.getLogger("polybatch.engine")

CPU_INFO = Path("/proc/cpuinfo")


def cost_key(config: ResolvedConfig, model: str, fingerprint: str) -> CostKey:
    """What an engine of this configuration is, on this machine."""
    is_cuda = config.executor == "cuda"
    return CostKey(
        device=_gpu_name(config.device) if is_cuda else _cpu_name(),
        threads=0 if is_cuda else config.threads or _num_processors(),
        model=model,
        fingerprint=fingerprint,
        executor=config.executor,
        dtype=config.dtype,
        quantization=config.quantization,
        kv_dtype=config.dtype,
        tensor_parallel_size=config.tensor_parallel_size,
    )


def profile_path(key: CostKey) -> Path:
    """Where the profile of this key is kept, whether or not it is there."""
    return cache_dir() / "costs" / key.file_name


def costs_for(key: CostKey) -> OnlineCost:
    """The costs that an engine begins with: calibrated where the cache has its profile, else to be learned.

    A profile that is none, or of another version, is told of and left alone.
    """
    path = profile_path(key)
    if not path.is_file():
        return OnlineCost()
    try:
        profile: CostProfile = load_profile(path)
    except ConfigError as error:
        logger.warning("%s; steps are predicted from the first ones instead", error)
        return OnlineCost()
    return OnlineCost(profile.model)


def _gpu_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def _cpu_name() -> str:
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "") or platform.processor() or platform.machine()


def _num_processors() -> int:
    from polybatch.execution.cpu import available_processors

    return available_processors()
