"""Where each row of an adapter lies in its pages. No torch: planners and executors share it.

One page id is valid in every layer, so an adapter takes as many pages as its largest layer needs and
page `p` of the adapter is the same page id everywhere. Rows start on 64 bytes (a cache line) and never
span a page. Blocks of rows are placed longest row first, each page taking as many consecutive rows as
fit, so that most rows of a block are a fixed stride apart and short rows fill the tails of long ones.
Source: unified paging, S-LoRA (Sheng et al. 2023), without its equal row lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polybatch.errors import AdapterError

ALIGN_BYTES = 64

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


class ModuleRows(NamedTuple):
    """What one module stores: rank rows of `a` and of `b`, and perhaps a gain and a bias row."""

    rank: int
    has_gain: bool = False
    has_bias: bool = False


class Place(NamedTuple):
    """A row's page, counted within the adapter, and its first byte in that page."""

    page: int
    offset: int


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """Places of one module's rows. Pages count from 0 within the adapter; offsets are bytes in the page.

    a_page, a_offset, b_page, b_offset: [rank]. Rows of `a` have `in` elements, all others `out`.
    """

    a_page: Int32s
    a_offset: Int64s
    b_page: Int32s
    b_offset: Int64s
    gain: Place | None = None
    bias: Place | None = None


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The whole adapter: one dict per layer, module -> places. Layers with equal rows share their tables."""

    num_pages: int
    page_bytes: int
    used_bytes: int
    layers: tuple[dict[str, ModuleLayout], ...]

    @property
    def utilisation(self) -> float:
        """Bytes of rows over bytes of the pages taken, over all layers; 1.0 for an empty adapter."""
        taken = self.num_pages * self.page_bytes * len(self.layers)
        return self.used_bytes / taken if taken else 1.0


def plan_layout(
    ranks: Sequence[Mapping[str, tuple[int, bool, bool]]],
    shapes: Mapping[str, tuple[int, int]],
    itemsize: int,
    page_bytes: int,
) -> AdapterLayout:
    """Place every row of an adapter.

    ranks: per layer, module -> (rank, has_gain, has_bias). shapes: module -> (out, in).
    itemsize: bytes of an element as stored. page_bytes: bytes of a page in one layer.
    Raises AdapterError if a row does not fit in a page.
    """
    seen: dict[tuple[tuple[str, ModuleRows], ...], tuple[dict[str, ModuleLayout], int, int]] = {}
    layers = []
    num_pages = used = 0
    for layer in ranks:
        key = tuple(sorted((module, ModuleRows(*rows)) for module, rows in layer.items()))
        if key not in seen:
            seen[key] = _plan_layer(dict(key), shapes, itemsize, page_bytes)
        tables, pages, layer_bytes = seen[key]
        layers.append(tables)
        num_pages = max(num_pages, pages)
        used += layer_bytes
    return AdapterLayout(num_pages, page_bytes, used, tuple(layers))


def _plan_layer(
    modules: Mapping[str, ModuleRows], shapes: Mapping[str, tuple[int, int]], itemsize: int, page_bytes: int
) -> tuple[dict[str, ModuleLayout], int, int]:
    """(places, pages, bytes of rows) of one layer."""
    blocks: dict[tuple[str, str], tuple[int, int]] = {}
    for module, rows in modules.items():
        out, in_ = shapes[module]
        blocks[module, "a"] = (rows.rank, in_ * itemsize)
        blocks[module, "b"] = (rows.rank, out * itemsize)
        blocks[module, "gain"] = (int(rows.has_gain), out * itemsize)
        blocks[module, "bias"] = (int(rows.has_bias), out * itemsize)
    pages = _Pages(page_bytes)
    # Longest rows first; among equals the larger block, so that small ones find tails.
    order = sorted(blocks, key=lambda block: (-blocks[block][1], -blocks[block][0], block))
    places = {block: pages.place(*blocks[block], what=f"{block[0]}.{block[1]}") for block in order}
    tables = {}
    for module in modules:
        a, b, gain, bias = (places[module, part] for part in ("a", "b", "gain", "bias"))
        tables[module] = ModuleLayout(
            *_columns(a), *_columns(b), gain[0] if gain else None, bias[0] if bias else None
        )
    used = sum(count * length for count, length in blocks.values())
    return tables, len(pages.free), used


class _Pages:
    """Pages of one layer while they fill; `free` is the number of bytes left at the end of each."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.free: list[int] = []

    def place(self, count: int, row_bytes: int, what: str) -> list[Place]:
        """Place `count` rows, as many as fit into the emptiest page at a time."""
        stride = -(-row_bytes // ALIGN_BYTES) * ALIGN_BYTES
        if count and row_bytes > self.page_bytes:
            raise AdapterError(
                f"a row of {what} has {row_bytes:,} bytes, a page {self.page_bytes:,}: raise the page size"
            )
        places: list[Place] = []
        while len(places) < count:
            page = max(range(len(self.free)), key=self.free.__getitem__, default=0)
            if not self.free or self.free[page] < row_bytes:
                page = len(self.free)
                self.free.append(self.page_bytes)
            start = self.page_bytes - self.free[page]
            # The last row of a page may lack the padding to the next cache line.
            fit = min(count - len(places), (self.free[page] - row_bytes) // stride + 1)
            places += [Place(page, start + i * stride) for i in range(fit)]
            self.free[page] = max(0, self.free[page] - fit * stride)
        return places


def _columns(places: list[Place]) -> tuple[Int32s, Int64s]:
    return (
        np.array([place.page for place in places], np.int32),
        np.array([place.offset for place in places], np.int64),
    )


__all__ = ["ALIGN_BYTES", "AdapterLayout", "ModuleLayout", "ModuleRows", "Place", "plan_layout"]
