"""lora in Triton: shrink (h = A x) and expand (y = gain (y + B h) + bias) over the work of `lora.work`.

Grids are fixed and programs walk lists whose lengths they read from device memory, so one CUDA graph
serves any adapters, and a launch without work ends at once. Rows of A and B go from the pool straight to
the matrix unit; tokens are padded to a tile's 16 or 64, which costs nothing where reading rows is what
costs. h is kept in float32 and split into two 16-bit terms for the second product: the result is rounded
once, as the contract asks. Nothing is added atomically: parts of h are summed in their order.

Shrink needs x alone, so it may run beside the base layer. Expand as a launch of its own is for steps of
several rounds and for sums over several GPUs; otherwise `lora.cuda_fused` adds B h where y is read next.
Sources: Punica (Chen et al. 2023) for shrink and expand; Flash-Decoding's split of the reduction.
"""

# Triton reads its kernels' annotations as its own.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from polybatch.adapters.layout import ALIGN_BYTES
from polybatch.kernels.lora.cuda_delta import (
    KEEP,
    RECORD_FIRST,
    RECORD_NUM_TOKENS,
    TILE_STRIDE,
    add_block,
    load_b,
    open_tile,
)
from polybatch.kernels.lora.work import (
    A_WORD,
    ABSENT,
    BLOCK_RANK,
    BLOCK_TOKENS,
    H_START,
    MODULE,
    NARROW,
    RANK,
    STRIDE,
    TILE_ITEMS,
    WIDE,
    GroupShape,
    LoraPlan,
)

_ITEMS = tl.constexpr(TILE_ITEMS)
_H_START, _RANK, _STRIDE = tl.constexpr(H_START), tl.constexpr(RANK), tl.constexpr(STRIDE)
_A_WORD, _MODULE, _ABSENT = tl.constexpr(A_WORD), tl.constexpr(MODULE), tl.constexpr(ABSENT)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How one kernel of one variant is compiled: columns of a block, and Triton's warps and stages."""

    columns: int
    num_warps: int
    num_stages: int


# Per variant; chosen by benchmarks/cuda/lora.py on an H100.
SHRINK = {NARROW: Tuning(128, 2, 4), WIDE: Tuning(128, 4, 3)}
# float32, whose columns are twice as wide.
SHRINK_EXACT = {NARROW: Tuning(64, 2, 4), WIDE: Tuning(32, 8, 4)}
EXPAND = {NARROW: Tuning(256, 4, 2), WIDE: Tuning(128, 4, 2)}
# Rows of B in one turn of expand's loop.
EXPAND_RANK = 16
PROGRAMS_PER_SM = 8
BESIDE_PER_SM = 8


@triton.jit(do_not_specialize=["layer", "part_blocks", "num_parts", "first_item", "max_items"])
def shrink_kernel(
    x, h, memory, words, tiles, items, bounds, first_item, max_items, stride_x, layer,
    part_blocks, num_parts,
    NUM_IN: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: some rows of A against one part of the columns of x, for one tile at a time.

    first_item: the first in the list, which has room for max_items, -1 where `bounds` must be asked. A
    program's first item is on its way before it knows whether there is one.
    """
    if first_item < 0:
        first_item = tl.load(bounds, eviction_policy=KEEP)
    last_item = tl.load(bounds + 1, eviction_policy=KEEP)
    at_item = first_item + tl.program_id(0) // num_parts
    item = tl.load(items + at_item, mask=at_item < max_items, other=0, eviction_policy=KEEP)
    for work in range(tl.program_id(0), (last_item - first_item) * num_parts, tl.num_programs(0)):
        part = work % num_parts
        record = tiles + (item // _ITEMS) * TILE_STRIDE
        first = tl.load(record + RECORD_FIRST, eviction_policy=KEEP)
        num_tokens = tl.load(record + RECORD_NUM_TOKENS, eviction_policy=KEEP)
        h_start = tl.load(record + _H_START, eviction_policy=KEEP)
        rank = tl.load(record + _RANK, eviction_policy=KEEP)
        a_word = tl.load(record + _A_WORD, eviction_policy=KEEP)
        word = a_word + layer * tl.load(record + _STRIDE, eviction_policy=KEEP)
        num_blocks = tl.cdiv(rank, BLOCK_R)
        per_item = tl.cdiv(num_blocks, _ITEMS)
        first_block = (item % _ITEMS) * per_item
        low = part * part_blocks
        high = tl.minimum(low + part_blocks, (NUM_IN + BLOCK_K - 1) // BLOCK_K)
        t = tl.arange(0, BLOCK_T)
        k = tl.arange(0, BLOCK_K)
        x_rows = x + (first + t).to(tl.int64)[:, None] * stride_x
        for block in range(first_block, tl.minimum(first_block + per_item, num_blocks)):
            r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            start = tl.load(words + word + r, mask=r < rank, other=-1, eviction_policy=KEEP)
            is_row = start >= 0
            rows = memory + start.to(tl.int64)[None, :] * UNIT
            total = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
            for step in tl.range(low, high, num_stages=STAGES):
                at = step * BLOCK_K + k
                is_a = is_row[None, :] & (at < NUM_IN)[:, None]
                is_x = (t < num_tokens)[:, None] & (at < NUM_IN)[None, :]
                a = tl.load(rows + at[:, None], mask=is_a, other=0.0)
                here = tl.load(x_rows + at[None, :], mask=is_x, other=0.0)
                total = tl.dot(here, a, total, input_precision="ieee" if EXACT else "tf32")
            target = (
                h + h_start.to(tl.int64) + (part * num_tokens + t).to(tl.int64)[:, None] * rank + r[None, :]
            )
            # A row that this layer lacks is 0 even where x is infinite.
            total = tl.where(is_row[None, :], total, 0.0)
            tl.store(target, total, mask=(t < num_tokens)[:, None] & (r < rank)[None, :])
        at_item = first_item + (work + tl.num_programs(0)) // num_parts
        item = tl.load(items + at_item, mask=at_item < last_item, other=0, eviction_policy=KEEP)


@triton.jit(do_not_specialize=["layer"])
def expand_kernel(
    y, h, memory, words, tiles, bounds, stride_y, layer,
    OUT_0: tl.constexpr, OUT_1: tl.constexpr, OUT_2: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: one block of columns of one module, for one tile at a time."""
    blocks_0: tl.constexpr = (OUT_0 + BLOCK_N - 1) // BLOCK_N
    blocks_1: tl.constexpr = (OUT_1 + BLOCK_N - 1) // BLOCK_N
    num_blocks: tl.constexpr = blocks_0 + blocks_1 + (OUT_2 + BLOCK_N - 1) // BLOCK_N
    is_even: tl.constexpr = (OUT_0 % BLOCK_N) + (OUT_1 % BLOCK_N) + (OUT_2 % BLOCK_N) == 0
    first_tile = tl.load(bounds + 2)
    num_work = (tl.load(bounds + 3) - first_tile) * num_blocks
    adapters = (tiles, h, memory, words, layer)
    for work in range(tl.program_id(0), num_work, tl.num_programs(0)):
        block = work % num_blocks
        tile = first_tile + work // num_blocks
        record = tiles + tile * TILE_STRIDE
        module = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
        if tl.load(record + _MODULE + 3 * module) != _ABSENT:
            # Column of the module, and of the group's output.
            before = tl.where(module == 0, 0, tl.where(module == 1, blocks_0, blocks_0 + blocks_1))
            width = tl.where(module == 0, OUT_0, tl.where(module == 1, OUT_1, OUT_2))
            offset = tl.where(module == 0, 0, tl.where(module == 1, OUT_0, OUT_0 + OUT_1))
            n = (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
            is_column = (n >= 0) if is_even else (n < width)
            t = tl.arange(0, BLOCK_T)
            is_token = t < tl.load(record + RECORD_NUM_TOKENS)
            first = tl.load(record + RECORD_FIRST)
            at = y + (first + t).to(tl.int64)[:, None] * stride_y + offset + n[None, :]
            is_target = is_token[:, None] & is_column[None, :]
            before_it = tl.load(at, mask=is_target, other=0.0).to(tl.float32)
            start, value, rest = open_tile(tile, t, is_token, module, adapters, BLOCK_R)
            b = load_b(start, n, is_column, memory, UNIT)
            after = add_block(before_it, value, b, rest, n, is_column, UNIT, BLOCK_R, True, EXACT)
            tl.store(at, after.to(y.dtype.element_ty), mask=is_target)


class CudaLora:
    """Launches the kernels for one model: nothing is allocated after the constructor.

    shapes: groups of a decoder layer. dtype: of activations and adapter rows. max_h: as in LoraLimits.
    num_programs: size of the grids; by default as many as the device holds at once.
    num_beside: size of shrink's grid where it runs beside the base layer, which needs multiprocessors too.
    """

    def __init__(
        self,
        shapes: tuple[GroupShape, ...],
        dtype: torch.dtype,
        device: torch.device,
        max_h: int,
        *,
        num_programs: int | None = None,
        num_beside: int | None = None,
    ) -> None:
        self.shapes = shapes
        self.h = torch.empty(max_h, dtype=torch.float32, device=device)
        self.unit = ALIGN_BYTES // dtype.itemsize
        self.is_exact = dtype == torch.float32
        if num_programs is None:
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
            num_programs = PROGRAMS_PER_SM * num_sms
            num_beside = num_beside or BESIDE_PER_SM * num_sms
        self._side = None
        if device.type == "cuda":
            self._side = torch.cuda.Stream(device)
        self.num_sms = max(num_programs // PROGRAMS_PER_SM, 1)
        self._grid = (num_programs,)
        self._grid_beside = (num_beside or num_programs,)

    def shrink(
        self,
        group: int,
        layer: int,
        x: torch.Tensor,
        memory: torch.Tensor,
        words: torch.Tensor,
        arrays: Mapping[str, torch.Tensor],
        plan: LoraPlan,
        round_: int = 0,
        *,
        is_beside: bool = False,
    ) -> None:
        """h of one round of one group. It may run beside the base layer: it reads x and writes h only.

        x: [T, in], rows contiguous. memory: the layer's pool, flat, in the dtype of x. words: from
        `CudaAdapters`. arrays: device copies of what `work.fill` wrote.
        """
        shape = self.shapes[group]
        for variant in _variants(plan, round_):
            tuning = (SHRINK_EXACT if self.is_exact else SHRINK)[variant]
            parts = (shape.narrow_parts, plan.wide_parts)[variant]
            columns = shape.part_columns if variant == NARROW else -(-shape.num_in // parts)
            (most,) = self._grid_beside if is_beside else self._grid
            if variant == NARROW:
                # A row has a tile at most, and a module seldom more than two blocks of rows.
                most = min(most, 2 * len(x) * parts * len(shape.modules))
            items = arrays["lora_items"]
            shrink_kernel[(most,)](
                x, self.h, memory, words, arrays["lora_tiles"][0, group], items[group],
                arrays["lora_bounds"][round_, variant, group], -1 if variant or round_ else 0,
                items.shape[1], x.stride(0), layer, -(-columns // tuning.columns), parts,
                NUM_IN=shape.num_in, UNIT=self.unit, BLOCK_T=BLOCK_TOKENS[variant],
                BLOCK_R=BLOCK_RANK if variant == NARROW else plan.wide_ranks[group],
                BLOCK_K=tuning.columns, STAGES=tuning.num_stages, EXACT=self.is_exact,
                num_warps=tuning.num_warps,
            )  # fmt: skip

    def shrink_beside(
        self,
        base: Callable[[], None],
        group: int,
        layer: int,
        x: torch.Tensor,
        memory: torch.Tensor,
        words: torch.Tensor,
        arrays: Mapping[str, torch.Tensor],
        plan: LoraPlan,
    ) -> None:
        """Launch the base layer and shrink: side by side in a graph, elsewhere shrink first.

        base: launches what reads x and writes y. What comes after on the current stream follows both.
        A graph's branches cost little; outside of one they cost more than they hide.
        """
        if self._side is None or not torch.cuda.is_current_stream_capturing():
            self.shrink(group, layer, x, memory, words, arrays, plan)
            base()
            return
        main = torch.cuda.current_stream(x.device)
        self._side.wait_stream(main)
        base()
        with torch.cuda.stream(self._side):
            self.shrink(group, layer, x, memory, words, arrays, plan, is_beside=True)
        main.wait_stream(self._side)

    def expand(
        self,
        group: int,
        layer: int,
        y: torch.Tensor,
        memory: torch.Tensor,
        words: torch.Tensor,
        arrays: Mapping[str, torch.Tensor],
        plan: LoraPlan,
        round_: int = 0,
    ) -> None:
        """Add one round of one group to y in place, then its gains and biases.

        y: [T, out], modules side by side, dtype of x. Call it after `shrink` of the same round and after
        the base layer wrote y.
        """
        shape = self.shapes[group]
        outs = (*shape.outs, 0, 0)
        for variant in _variants(plan, round_):
            tuning = EXPAND[variant]
            expand_kernel[self._grid](
                y, self.h, memory, words, arrays["lora_tiles"][0, group],
                arrays["lora_bounds"][round_, variant, group], y.stride(0), layer,
                OUT_0=outs[0], OUT_1=outs[1], OUT_2=outs[2], UNIT=self.unit,
                BLOCK_T=BLOCK_TOKENS[variant], BLOCK_R=EXPAND_RANK, BLOCK_N=tuning.columns,
                EXACT=self.is_exact, num_warps=tuning.num_warps, num_stages=tuning.num_stages,
            )  # fmt: skip

    def __call__(
        self,
        group: int,
        layer: int,
        x: torch.Tensor,
        y: torch.Tensor,
        memory: torch.Tensor,
        words: torch.Tensor,
        arrays: Mapping[str, torch.Tensor],
        plan: LoraPlan,
        exchange: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        """All rounds of one group, one after the other on the current stream.

        exchange: what happens to a round's h, [num_h] float32, between shrink and expand.
        """
        for round_ in range(len(plan.rounds)):
            self.shrink(group, layer, x, memory, words, arrays, plan, round_)
            if exchange is not None:
                exchange(self.h[: plan.num_h[round_]])
            self.expand(group, layer, y, memory, words, arrays, plan, round_)


def _variants(plan: LoraPlan, round_: int) -> list[int]:
    has_narrow, has_wide = plan.rounds[round_]
    return [NARROW] * has_narrow + [WIDE] * has_wide


__all__ = ["CudaLora", "Tuning", "expand_kernel", "shrink_kernel"]
