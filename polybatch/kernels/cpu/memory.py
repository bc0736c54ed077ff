"""Memory for weights, buffers and pages: aligned, zeroed, in huge pages where large."""

from __future__ import annotations

import ctypes
import mmap
import threading

import numpy as np
import torch

from polybatch.kernels.cpu.emit import VECTOR_BYTES

HUGE_PAGE_BYTES = 2 << 20
AREA_BYTES = 64 << 20
"""Taken from the system at once for weights; what is never written never takes memory."""


def aligned_bytes(size: int) -> torch.Tensor:
    """Zeroed uint8 tensor of `size` bytes at a 64-byte boundary, with at least 128 bytes of slack behind.

    Large ones lie in huge pages where the system grants them; memory is taken when first touched.
    """
    if size >= HUGE_PAGE_BYTES:
        area = mmap.mmap(-1, size + 2 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            area.madvise(mmap.MADV_HUGEPAGE)
        raw, multiple = torch.frombuffer(area, dtype=torch.uint8), HUGE_PAGE_BYTES
    else:
        raw, multiple = torch.from_numpy(np.zeros(size + 4 * VECTOR_BYTES, dtype=np.uint8)), VECTOR_BYTES
    start = -raw.data_ptr() % multiple
    return raw[start : start + size]


class Area:
    """Many blocks side by side in few huge pages. Blocks are as `aligned_bytes` gives them; thread-safe."""

    def __init__(self, chunk_bytes: int = AREA_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._left = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def bytes(self, size: int) -> torch.Tensor:
        """The next `size` bytes, zeroed; they live as long as anyone holds them."""
        taken = -(-size // VECTOR_BYTES) * VECTOR_BYTES + 2 * VECTOR_BYTES
        with self._lock:
            if taken > self._left.numel():
                self._left = aligned_bytes(max(taken, self._chunk_bytes))
            block, self._left = self._left[:size], self._left[taken:]
        return block


def release_free_memory() -> None:
    """Give what the C allocator holds free back to the system, where it can (glibc).

    Packing frees many megabytes between blocks that stay; without this they would count for good.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
