"""silu_mul in plain torch; the contract stands in the package's docstring."""

from __future__ import annotations

import torch
from torch.nn import functional


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up: [T, 2 N], gate first. Returns silu(gate) * up, [T, N]."""
    gate, up = gate_up.chunk(2, dim=1)
    return functional.silu(gate) * up
