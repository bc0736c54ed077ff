"""What a load of an adapter copies, worked out once: pieces of host memory and the table of their rows.

    AdapterShape   where rows go; one for all adapters of equal ranks
    LoadPlan       how rows come through staging; one for all of a shape that lie alike in host memory

A piece is a range of the host's runs, laid end to end, that passes through staging at once, with the table
that says where its rows go (`kernels.scatter_rows`).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from polybatch.adapters.layout import ALIGN_BYTES, AdapterLayout
from polybatch.errors import EngineError
from polybatch.execution.adapter_words import AdapterWords

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]

TABLE_FIELDS = 4
TABLE_ROW_BYTES = 4 * TABLE_FIELDS
WIDE_BYTES = 16
"""Unit of rows' starts and lengths where all are multiples of it; else it is an element."""


class Piece(NamedTuple):
    """Rows [first, last) of the table, whose bytes lie in [low, high) of the runs."""

    first: int
    last: int
    low: int
    high: int

    @property
    def data_start(self) -> int:
        """Byte of staging at which the data follow the table."""
        return -(-(self.last - self.first) * TABLE_ROW_BYTES // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadPlan:
    """table: [rows, TABLE_FIELDS] int32, pinned if asked for, sources counted from their piece's low.

    unit_bytes: what sources and lengths count.
    """

    table: torch.Tensor
    unit_bytes: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class AdapterShape:
    """What adapters of equal ranks share.

    itemsize: bytes of an element.
    num_rows, row_bytes: [tensors], of every tensor with rows, in the order of `adapters.pack.stored`.
    layers, places: [rows], as in `scatter_rows`. has_scales: whether there are gains or biases.
    """

    layout: AdapterLayout
    words: AdapterWords
    itemsize: int
    num_rows: Int64s
    row_bytes: Int64s
    layers: Int32s
    places: Int32s
    has_scales: bool
    plans: weakref.WeakValueDictionary[bytes, LoadPlan] = field(default_factory=weakref.WeakValueDictionary)

    def plan(self, starts: Int64s, piece_bytes: int, *, pin: bool) -> LoadPlan:
        """The plan for tensors at these bytes of the runs. piece_bytes: of staging, always the same.

        Raises EngineError if a row and its record do not fit there.
        """
        key = starts.tobytes()
        plan = self.plans.get(key)
        if plan is None:
            self.plans[key] = plan = self._plan(starts, piece_bytes, pin)
        return plan

    def _plan(self, starts: Int64s, piece_bytes: int, pin: bool) -> LoadPlan:
        lengths = np.repeat(self.row_bytes, self.num_rows)
        first_rows = np.cumsum(self.num_rows) - self.num_rows
        within = np.arange(len(lengths)) - np.repeat(first_rows, self.num_rows)
        sources = np.repeat(starts, self.num_rows) + within * lengths
        order = np.argsort(sources, kind="stable")
        sources, lengths = sources[order], lengths[order]
        pieces = _cut(sources, lengths, piece_bytes)
        relative = sources.copy()
        for piece in pieces:
            relative[piece.first : piece.last] -= piece.low
        is_wide = not ((relative % WIDE_BYTES).any() or (lengths % WIDE_BYTES).any())
        unit = WIDE_BYTES if is_wide else self.itemsize
        columns = (relative // unit, lengths // unit, self.layers[order], self.places[order])
        table = torch.from_numpy(np.stack(columns, axis=1).astype(np.int32))
        return LoadPlan(table.pin_memory() if pin else table, unit, pieces)


def adapter_shape(
    layout: AdapterLayout, words: AdapterWords, shapes: Mapping[str, tuple[int, int]], itemsize: int
) -> AdapterShape:
    """shapes: module -> (out, in); itemsize: bytes of an element as stored."""
    num_rows: list[int] = []
    row_bytes: list[int] = []
    layers: list[Int64s] = []
    places: list[Int64s] = []
    for index, layer in enumerate(layout.layers):
        for module, rows in sorted(layer.items()):
            out, in_ = shapes[module]
            blocks = [(rows.a_page, rows.a_offset, in_), (rows.b_page, rows.b_offset, out)]
            for place in (rows.gain, rows.bias):
                if place is not None:
                    blocks.append((np.array([place.page]), np.array([place.offset]), out))
            for page, offset, width in blocks:
                if len(page):
                    num_rows.append(len(page))
                    row_bytes.append(width * itemsize)
                    layers.append(np.full(len(page), index))
                    places.append((page.astype(np.int64) * layout.page_bytes + offset) // ALIGN_BYTES)
    none = [np.zeros(0, np.int64)]
    return AdapterShape(
        layout, words, itemsize, np.array(num_rows, np.int64), np.array(row_bytes, np.int64),
        np.concatenate(layers or none).astype(np.int32), np.concatenate(places or none).astype(np.int32),
        any(rows.gain or rows.bias for layer in layout.layers for rows in layer.values()),
    )  # fmt: skip


def _cut(sources: Int64s, lengths: Int64s, piece_bytes: int) -> tuple[Piece, ...]:
    """Pieces of as many rows as fit, with their table. sources: ascending; rows may overlap."""
    pieces: list[Piece] = []
    ends = np.maximum.accumulate(sources + lengths)
    filled = ends + np.arange(1, len(ends) + 1) * TABLE_ROW_BYTES
    first = 0
    while first < len(sources):
        low = int(sources[first])
        # The table is rounded up to where data may begin.
        limit = piece_bytes - ALIGN_BYTES + low + first * TABLE_ROW_BYTES
        last = int(np.searchsorted(filled, limit, side="right"))
        if last <= first:
            raise EngineError(
                f"a row of {int(lengths[first]):,} bytes does not fit in {piece_bytes:,} of staging: raise "
                "staging_bytes"
            )
        pieces.append(Piece(first, last, low, int(ends[last - 1])))
        first = last
    return tuple(pieces)


__all__ = ["AdapterShape", "LoadPlan", "Piece", "adapter_shape"]
