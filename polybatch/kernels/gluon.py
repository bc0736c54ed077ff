"""Whether kernels in Gluon run, the experimental part of Triton in which those for Hopper GPUs are written.

Their modules are imported only where they do.
"""

from __future__ import annotations

import torch
import triton

from polybatch.kernels.interpret import is_interpreted

VERSION = "3.6."
"""Of Triton, whose Gluon may change from version to version."""


def runs_hopper_kernels(device: torch.device | None = None) -> bool:
    """Whether a device is a Hopper GPU and Triton compiles for it. device: None for the current GPU."""
    if is_interpreted() or not triton.__version__.startswith(VERSION) or not torch.cuda.is_available():
        return False
    if device is not None and device.type != "cuda":
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


__all__ = ["runs_hopper_kernels"]
