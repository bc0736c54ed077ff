"""scatter_rows for CUDA: a program per row, 16 bytes per thread at a time where the unit is 16 bytes."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polybatch.kernels.interpret import is_interpreted
from polybatch.kernels.scatter_rows.reference import PLACE_BYTES

NUM_WARPS = 4
# The interpreter takes its time for each program, and for each element of a tile, masked or not.
ROWS, BLOCK_BYTES = (16, 512) if is_interpreted() else (1, 8192)


def scatter_rows(
    table: torch.Tensor,
    data: torch.Tensor,
    page_ids: torch.Tensor,
    arena: torch.Tensor,
    unit: int,
    *,
    num_rows: int,
    data_start: int = 0,
) -> None:
    """Contract as in the package's docstring, but for what spares a launch its slicing of tensors.

    table: at least [num_rows * 4] int32, flat. data_start: element of `data` from which sources count.
    """
    if not num_rows:
        return
    size = arena.element_size()
    _scatter_rows[(triton.cdiv(num_rows, ROWS),)](
        table, data, data_start, page_ids, arena, num_rows, arena.shape[1], UNIT=unit,
        PLACE=PLACE_BYTES // size, PLACES_PER_PAGE=arena.shape[2] * size // PLACE_BYTES,
        ROWS=ROWS, BLOCK=BLOCK_BYTES // size, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _scatter_rows(
    table,
    data,
    data_start,
    page_ids,
    arena,
    num_rows,
    num_pages,
    UNIT: tl.constexpr,
    PLACE: tl.constexpr,
    PLACES_PER_PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    is_row = row < num_rows
    source = tl.load(table + row * 4, mask=is_row, other=0) * UNIT
    length = tl.load(table + row * 4 + 1, mask=is_row, other=0) * UNIT
    layer = tl.load(table + row * 4 + 2, mask=is_row, other=0)
    place = tl.load(table + row * 4 + 3, mask=is_row, other=0)
    page = tl.load(page_ids + place // PLACES_PER_PAGE) + layer * num_pages
    start = (page.to(tl.int64) * PLACES_PER_PAGE + place % PLACES_PER_PAGE) * PLACE
    for low in range(0, tl.max(length), BLOCK):
        column = low + tl.arange(0, BLOCK)[None, :]
        mask = column < length
        values = tl.load(data + data_start + source + column, mask=mask)
        tl.store(arena + start + column, values, mask=mask)
