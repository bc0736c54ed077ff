"""Memory that the packed linears of one stream share, and what they all ask of a product's tensors."""

from __future__ import annotations

import torch

from polybatch.errors import EngineError


class LinearWorkspace:
    """Memory that the packed linears of one stream share; grown while packing, never while running.

    dtype: of activations, bfloat16, float16 or float32 (the last only for unquantised weights).
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype, max_tokens: int) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_tokens = max_tokens
        self._buffers: dict[str, torch.Tensor] = {}

    def reserve(self, name: str, numel: int, dtype: torch.dtype) -> None:
        """Make a buffer, filled with zeros, at least this large; earlier graphs over it become invalid."""
        held = self._buffers.get(name)
        if held is None or held.numel() < numel:
            self._buffers[name] = torch.zeros(numel, dtype=dtype, device=self.device)

    def buffer(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    @property
    def num_bytes(self) -> int:
        return sum(b.numel() * b.element_size() for b in self._buffers.values())


def check_product(
    x: torch.Tensor, out: torch.Tensor, num_in: int, num_out: int, workspace: LinearWorkspace
) -> None:
    """Raise EngineError unless x [T, num_in] and out [T, num_out] suit a product in this workspace."""
    if x.shape[0] > workspace.max_tokens:
        raise EngineError(
            f"a linear layer got {x.shape[0]} tokens; its workspace holds {workspace.max_tokens}"
        )
    if x.shape[1] != num_in or tuple(out.shape) != (x.shape[0], num_out):
        raise EngineError(
            f"linear from {num_in} to {num_out} got x {list(x.shape)} and out {list(out.shape)}"
        )
    if x.dtype != workspace.dtype or out.dtype != workspace.dtype or x.stride(1) != 1 or out.stride(1) != 1:
        raise EngineError(f"x and out must be {workspace.dtype} with a contiguous last axis")
