"""Adapters in the pages of the CPU's pool: rows copied in, tables of row addresses for the kernels.

An adapter's row addresses are known up to the pages it lies in; loading fills in the pages, has the
team copy (and round) the rows from host memory, and yields a table that stays valid while the pages do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from polybatch.adapters.layout import AdapterLayout, plan_layout
from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec
from polybatch.kernels.cpu.emit import LANES
from polybatch.kernels.cpu.layout import (
    A_ROWS,
    B_ROWS,
    BIAS,
    FIELDS,
    GAIN,
    H_OFFSET,
    ITEM_BYTES,
    MODULES,
    RANK,
    padded,
)
from polybatch.kernels.cpu.team import Program, Team
from polybatch.kernels.norm.cpu import compile_store_rows

Int64s = np.ndarray[Any, np.dtype[np.int64]]

# Modules that share an input, and so a row of intermediate values.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def cpu_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Row lengths of the linear layers as stored: o_proj reads heads padded to whole vectors."""
    shapes = dict(spec.linear_shapes)
    shapes["o_proj"] = (spec.hidden_size, spec.num_heads * padded(spec.head_dim, LANES))
    return shapes


@dataclass(slots=True)
class PlacedAdapter:
    """An adapter ready to be loaded: where its rows come from and, but for the pages, where they go.

    num_ranks: intermediate values per token at most. sources, widths, layers, pages, offsets: [rows].
    table: [layers, modules, FIELDS], whose row fields are addresses inside `rows`, the array of row
    addresses that loading fills. kept: what `sources` and the table point to.
    """

    num_ranks: int
    sources: Int64s
    widths: Int64s
    layers: Int64s
    pages: Int64s
    offsets: Int64s
    rows: Int64s
    table: Int64s
    kept: list[torch.Tensor]
    resident: tuple[int, ...] | None = None


@dataclass(slots=True)
class CpuAdapters:
    """Adapters placed in one pool. base: address of the arena.

    max_placed: adapters whose tables are kept, more than a step can use.
    """

    spec: ModelSpec
    dtype: str
    page_bytes: int
    layer_bytes: int
    base: int
    team: Team
    max_placed: int
    placed: dict[str, PlacedAdapter] = field(default_factory=dict)
    _state: Int64s = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def layout(self, weights: AdapterWeights) -> AdapterLayout:
        ranks = [{name: (d.rank, False, False) for name, d in layer.items()} for layer in weights.layers]
        return plan_layout(ranks, cpu_shapes(self.spec), ITEM_BYTES[self.dtype], self.page_bytes)

    def load(self, weights: AdapterWeights, pages: tuple[int, ...]) -> None:
        """Copy an adapter's rows into these pages of every layer."""
        placed = self.placed.pop(weights.digest, None) or self._place(weights)
        self.placed[weights.digest] = placed
        # oldest first; one still resident is placed again when used
        while len(self.placed) > self.max_placed:
            del self.placed[next(iter(self.placed))]
        ids = np.asarray(pages, dtype=np.int64)
        if len(placed.rows):
            np.add(self.base + placed.layers * self.layer_bytes + ids[placed.pages] * self.page_bytes,
                   placed.offsets, out=placed.rows)  # fmt: skip
            args = [placed.sources.ctypes.data, 0, placed.rows.ctypes.data, 0, placed.widths.ctypes.data]
            args += [0] * 8 + [len(placed.rows)]
            program = Program([(compile_store_rows(self.dtype), args)])
            self.team.run(program, self._state.ctypes.data)
        placed.resident = pages

    def table(self, weights: AdapterWeights, pages: tuple[int, ...]) -> PlacedAdapter:
        """The tables of a resident adapter; loads it anew where the pages are not those it was loaded to."""
        placed = self.placed.pop(weights.digest, None)
        if placed is not None:
            self.placed[weights.digest] = placed  # the dict's order is the order of use
        if placed is None or placed.resident != pages:
            self.load(weights, pages)
            placed = self.placed[weights.digest]
        return placed

    def _place(self, weights: AdapterWeights) -> PlacedAdapter:
        layout = self.layout(weights)
        shapes = cpu_shapes(self.spec)
        table = np.zeros((self.spec.num_layers, len(MODULES), FIELDS), dtype=np.int64)
        columns: list[list[Int64s]] = [[] for _ in range(5)]
        starts: list[tuple[int, int, int, int]] = []  # layer, module, field, first row
        kept: list[torch.Tensor] = []
        total = num_ranks = 0
        for index, (deltas, places) in enumerate(zip(weights.layers, layout.layers, strict=True)):
            for group in GROUPS:
                h_offset = 0
                for name in group:
                    delta = deltas.get(name)
                    if delta is None:
                        continue
                    module = MODULES.index(name)
                    table[index, module, RANK] = delta.rank
                    table[index, module, H_OFFSET] = h_offset
                    h_offset += delta.rank
                    for where, vector in ((GAIN, delta.gain), (BIAS, delta.bias)):
                        if vector is not None:
                            kept.append(vector.float().contiguous())
                            table[index, module, where] = kept[-1].data_ptr()
                    where_rows = places[name]
                    a = self._spread(delta.a, shapes[name][1]) if name == "o_proj" else delta.a
                    for matrix, where, page, offset in (
                        (a, A_ROWS, where_rows.a_page, where_rows.a_offset),
                        (delta.b, B_ROWS, where_rows.b_page, where_rows.b_offset),
                    ):
                        matrix = matrix.contiguous()
                        kept.append(matrix)
                        rank, width = matrix.shape
                        first = matrix.data_ptr() + 4 * width * np.arange(rank, dtype=np.int64)
                        parts = (first, np.full(rank, width), np.full(rank, index), page, offset)
                        for column, part in zip(columns, parts, strict=True):
                            column.append(np.asarray(part, dtype=np.int64))
                        starts.append((index, module, where, total))
                        total += rank
                num_ranks = max(num_ranks, h_offset)
        sources, widths, layers, pages, offsets = (
            np.concatenate(c) if c else np.zeros(0, dtype=np.int64) for c in columns
        )
        rows = np.zeros(total, dtype=np.int64)
        for index, module, where, first_row in starts:
            table[index, module, where] = rows.ctypes.data + 8 * first_row
        return PlacedAdapter(num_ranks, sources, widths, layers, pages, offsets, rows, table, kept)

    def _spread(self, a: torch.Tensor, width: int) -> torch.Tensor:
        """o_proj's A for heads padded to whole vectors."""
        if a.shape[1] == width:
            return a
        spread = torch.zeros(a.shape[0], self.spec.num_heads, width // self.spec.num_heads)
        spread[:, :, : self.spec.head_dim] = a.view(a.shape[0], self.spec.num_heads, -1)
        return spread.flatten(1)
