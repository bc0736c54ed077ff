"""The page pool's memory: one arena of equal pages per layer, holding keys and values or adapter rows.

Bookkeeping (which page belongs to whom) lies in `polybatch.memory`; here are only bytes.
"""

from __future__ import annotations

import torch

from polybatch.config import ModelSpec, PoolSpec

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALIGNMENT_BYTES = 64


def page_bytes(spec: ModelSpec, page_size: int, dtype: str) -> int:
    """Bytes of one page in one layer: keys and values of page_size tokens, or the model's longest row.

    dtype: of keys, values and adapter rows, a key of TORCH_DTYPES. Rounded up to a cache line.
    """
    itemsize = TORCH_DTYPES[dtype].itemsize
    kv_elements = 2 * page_size * spec.kv_size
    longest_row = max(max(shape) for shape in spec.linear_shapes.values())
    return -(-max(kv_elements, longest_row) * itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class PageMemory:
    """The arena of a pool, [num_layers, num_pages, page_bytes] uint8, and views into it.

    The reference layout of a page that holds tokens is [2, KH, page_size, D], keys first, at its start.
    Fresh memory is not cleared; kernels must never let what nobody wrote reach a result.
    """

    def __init__(self, spec: ModelSpec, pool: PoolSpec, dtype: str, device: str = "cpu") -> None:
        self.dtype = TORCH_DTYPES[dtype]
        self._kv_shape = (2, spec.num_kv_heads, pool.page_size, spec.head_dim)
        self.arena = torch.empty(
            pool.num_layers, pool.num_pages, pool.page_bytes, dtype=torch.uint8, device=device
        )

    def kv(self, layer: int) -> torch.Tensor:
        """One layer as keys and values, [num_pages, 2, KH, page_size, D], a view."""
        kv_bytes = torch.Size(self._kv_shape).numel() * self.dtype.itemsize
        held = self.arena[layer, :, :kv_bytes].view(self.dtype)
        return held.view(-1, *self._kv_shape)

    def rows(self, layer: int) -> torch.Tensor:
        """One layer as a flat vector in the pool's dtype, [num_pages * page_bytes / itemsize], a view."""
        return self.arena[layer].view(self.dtype).view(-1)

    def copy_page(self, src: int, dst: int) -> None:
        """Copy a whole page in every layer."""
        self.arena[:, dst] = self.arena[:, src]
