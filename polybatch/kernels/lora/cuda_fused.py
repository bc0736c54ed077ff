"""Expand without a launch of its own: the kernels that read y next, with B h added on the way.

One round's h must be complete (`LoraPlan.is_fusable`), and nothing may come between the base layer and its
adapter. Each has a launch over rows, for decode steps, short chunks and rows without adapters, and one over
wide tiles; a step launches those for which it has work.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from polybatch.kernels.activation.cuda import silu_mul
from polybatch.kernels.lora.cuda import CudaLora
from polybatch.kernels.lora.cuda_rms_norm import rms_norm_rows, rms_norm_tiles
from polybatch.kernels.lora.cuda_silu_mul import silu_mul_rows, silu_mul_tiles
from polybatch.kernels.lora.cuda_write_kv import write_kv_rows, write_kv_tiles
from polybatch.kernels.lora.work import (
    BLOCK_TOKENS,
    DOWN_PARTS,
    GROUPS,
    MAX_PARTS,
    NARROW,
    TILE_UNITS,
    WIDE,
    LoraPlan,
)
from polybatch.kernels.norm.cuda import checked_width, rms_norm
from polybatch.kernels.write_kv.cuda import head_shape, queries_of, write_kv

QKV, O, GATE_UP, DOWN = range(len(GROUPS))  # noqa: E741

# Chosen by benchmarks/cuda/lora.py on an H100. Columns of a block, rows of B in a turn for one token, warps,
# stages.
SILU_ROWS = (512, 16, 4, 3)
# Columns of a block, warps, stages.
SILU_TILES = (64, 4, 3)
# Elements of B in a turn, warps for 4,096 columns: where programs share a multiprocessor; where each has one.
NORM_ROWS = (1 << 15, 8)
NORM_ROWS_ALONE = (1 << 16, 16)
# Columns of a block, tokens, warps, stages.
NORM_TILES = (256, 32, 8, 2)
# Heads of a program, at most FEW_ROWS + 1, rows of B in a turn for one token and for several, warps.
WRITE_ROWS = (4, 16, 8, 2)
# Heads of a program, warps, stages.
WRITE_TILES = (4, 4, 1)
# Of float32, which would spill with fewer warps.
WRITE_TILES_EXACT = (1, 8, 1)
TILE_RANK = 16
# Registers of a thread at 16 bits where more would be taken and would keep programs waiting.
REGISTERS = 128


class FusedLora:
    """One step's adapters, over device copies of what `work.fill` wrote.

    words: from `CudaAdapters`. num_rows: of the step. Methods take the layer's pool as `memory`, flat, in
    the dtype of the activations; h of the group must have been computed by `CudaLora.shrink`. They raise
    EngineError as the plain kernels do.
    """

    def __init__(
        self,
        lora: CudaLora,
        words: torch.Tensor,
        arrays: Mapping[str, torch.Tensor],
        plan: LoraPlan,
        num_rows: int,
    ) -> None:
        self._lora, self._words, self._plan, self._num_rows = lora, words, plan, num_rows
        # Rows before these have no adapter and are the plain kernels'.
        self._base = plan.num_base
        self._rows, self._units = arrays["lora_rows"], arrays["lora_units"]
        self._tiles = [arrays["lora_tiles"][0, group] for group in range(len(GROUPS))]
        self._bounds = [arrays["lora_bounds"][0, WIDE, group] for group in range(len(GROUPS))]

    def silu_mul(self, layer: int, memory: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """`activation.cuda.silu_mul` of the base layer's gate_up [T, 2 N] and its adapters."""
        width, base = out.shape[1], self._base
        if base:
            silu_mul(gate_up[:base], out=out[:base])
        if self._plan.has_rows:
            columns, rank, warps, stages = SILU_ROWS
            # The matrix unit takes 16 columns at least, of which a tile's units have so many.
            block = max(min(columns, triton.next_power_of_2(width)), 16 * TILE_UNITS)
            num_units = self._plan.num_units or self._num_rows - base
            silu_mul_rows[(num_units, triton.cdiv(width, block))](
                gate_up, gate_up.stride(0), out, out.stride(0), self._units,
                *self._of_tiles(GATE_UP, layer, memory)[1:],
                WIDTH=width, BLOCK=block, UNIT=self._lora.unit, RANK_ONE=rank,
                PARTS=self._parts(GATE_UP), BLOCK_R=TILE_RANK, STAGES=stages, EXACT=self._lora.is_exact,
                num_warps=warps, maxnreg=self._registers(warps),
            )  # fmt: skip
        if self._plan.num_wide:
            block, warps, stages = SILU_TILES
            num_blocks = triton.cdiv(triton.cdiv(width, block), DOWN_PARTS)
            silu_mul_tiles[(DOWN_PARTS, self._plan.num_wide)](
                gate_up, gate_up.stride(0), out, out.stride(0), *self._of_tiles(GATE_UP, layer, memory),
                WIDTH=width, BLOCK=block, NUM_BLOCKS=num_blocks, BLOCK_T=BLOCK_TOKENS[WIDE],
                DOWN_R=self._plan.wide_ranks[DOWN],
                **self._compiled_tiles(warps, stages), maxnreg=self._tile_registers(warps),
            )  # fmt: skip

    def rms_norm(
        self,
        group: int,
        layer: int,
        memory: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        *,
        residual: torch.Tensor,
        out: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:
        """`norm.cuda.rms_norm` of residual + x, where x is what the base layer made, and its adapters.

        group: O or DOWN. layer: of that product.
        """
        width = checked_width(x)
        base, num_rows = self._base, self._num_rows - self._base
        if rows is not None:
            base, num_rows = 0, len(rows)
        elif base:
            rms_norm(x[:base], weight, eps, residual=residual[:base], out=out[:base])
        if num_rows and (self._plan.has_rows or rows is not None):
            # Of chosen rows one way is enough, which need not be compiled twice.
            is_alone = rows is not None or num_rows <= self._lora.num_sms
            elements, warps = NORM_ROWS_ALONE if is_alone else NORM_ROWS
            block = triton.next_power_of_2(width)
            # Registers hold so many elements of B; those of 32 bits count twice.
            rank = min(max(elements // ((1 + self._lora.is_exact) * block), 1), 16)
            warps = min(max(block * warps // 4096, 1), 16)
            rms_norm_rows[(num_rows,)](
                x[base:], x.stride(0), residual[base:], residual.stride(0), rows, weight,
                out[base:], out.stride(0), eps, *self._of_rows(group, layer, memory, base),
                WIDTH=width, BLOCK=block, HAS_CHOSEN=rows is not None,
                HAS_WIDE=rows is None and self._plan.num_wide > 0, UNIT=self._lora.unit, BLOCK_R=rank,
                # Of chosen rows some are in wide tiles.
                PARTS=MAX_PARTS if rows is not None else self._parts(group),
                num_warps=warps, maxnreg=self._registers(warps) if warps >= 8 else None,
            )  # fmt: skip
        if self._plan.num_wide and rows is None:
            block, tokens, warps, stages = NORM_TILES
            pieces = BLOCK_TOKENS[WIDE] // tokens
            rms_norm_tiles[(self._plan.num_wide * pieces,)](
                x, x.stride(0), residual, residual.stride(0), weight, out, out.stride(0), eps,
                *self._of_tiles(group, layer, memory),
                WIDTH=width, BLOCK=block, BLOCK_T=tokens, PIECES=pieces,
                **self._compiled_tiles(warps, stages), maxnreg=self._tile_registers(warps),
            )  # fmt: skip

    def write_kv(
        self,
        layer: int,
        memory: torch.Tensor,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        table: torch.Tensor,
        kv_pages: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """`write_kv.cuda.write_kv` of the base layer's qkv and its adapters; returns q, a view of qkv."""
        shape, base = head_shape(qkv, table, kv_pages), self._base
        given = (table, kv_pages, kv_pages.stride(0), bias, q_norm, k_norm, eps)
        compiled = {**shape, "HAS_BIAS": bias is not None, "HAS_NORM": q_norm is not None}
        if base:
            write_kv(
                qkv[:base], positions[:base], slots[:base], table, kv_pages,
                bias=bias, q_norm=q_norm, k_norm=k_norm, eps=eps,
            )  # fmt: skip

        def blocks(heads: int) -> int:
            return -(-shape["NUM_HEADS"] // heads) + 2 * -(-shape["KV_HEADS"] // heads)

        if self._plan.has_rows:
            heads, rank_one, rank_few, warps = WRITE_ROWS
            write_kv_rows[(self._num_rows - base, blocks(heads))](
                qkv[base:], qkv.stride(0), positions[base:], slots[base:], *given,
                *self._of_rows(QKV, layer, memory, base), **compiled, UNIT=self._lora.unit, HEADS=heads,
                RANK_ONE=rank_one, RANK_FEW=rank_few, PARTS=self._parts(QKV),
                BLOCK_R=TILE_RANK, BLOCK_T=BLOCK_TOKENS[NARROW], EXACT=self._lora.is_exact,
                num_warps=warps, maxnreg=self._registers(warps),
            )  # fmt: skip
        if self._plan.num_wide:
            heads, warps, stages = WRITE_TILES_EXACT if self._lora.is_exact else WRITE_TILES
            write_kv_tiles[(blocks(heads), self._plan.num_wide)](
                qkv, qkv.stride(0), positions, slots, *given, *self._of_tiles(QKV, layer, memory),
                **compiled, HEADS=heads, BLOCK_T=BLOCK_TOKENS[WIDE], **self._compiled_tiles(warps, stages),
            )  # fmt: skip
        return queries_of(qkv, shape)

    def _of_rows(self, group: int, layer: int, memory: torch.Tensor, base: int) -> tuple[Any, ...]:
        """Arguments of a kernel over rows: from its lists on."""
        rows = self._rows[:, base:]
        return rows, rows.stride(0), self._tiles[group], self._lora.h, memory, self._words, layer

    def _parts(self, group: int) -> int:
        """Most parts of h in narrow tiles, a power of two."""
        parts: int = triton.next_power_of_2(self._lora.shapes[group].narrow_parts)
        return parts

    def _registers(self, num_warps: int) -> int | None:
        """Most registers of a thread, None for any that there are."""
        return None if self._lora.is_exact else min(REGISTERS, 65536 // (32 * num_warps))

    def _tile_registers(self, num_warps: int) -> int | None:
        return None if self._plan.is_long else self._registers(num_warps)

    def _of_tiles(self, group: int, layer: int, memory: torch.Tensor) -> tuple[Any, ...]:
        """Arguments of a kernel over wide tiles: from its bounds on."""
        return self._bounds[group], self._tiles[group], self._lora.h, memory, self._words, layer

    def _compiled_tiles(self, num_warps: int, num_stages: int) -> dict[str, int]:
        """What is compiled into all kernels over wide tiles."""
        return {
            "UNIT": self._lora.unit, "BLOCK_R": TILE_RANK, "IS_LONG": self._plan.is_long,
            "EXACT": self._lora.is_exact, "num_warps": num_warps, "num_stages": num_stages,
        }  # fmt: skip


__all__ = ["DOWN", "GATE_UP", "QKV", "FusedLora", "O"]
