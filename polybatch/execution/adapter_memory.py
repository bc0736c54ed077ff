"""Adapter rows in pool pages: written where `plan_layout` places them, found again for the kernels.

Rows lie in the pool's dtype. The pages come from the plan; an adapter may be moved by copying its pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from polybatch.adapters.layout import AdapterLayout, Int64s, ModuleLayout, ModuleRows, plan_layout
from polybatch.adapters.weights import AdapterWeights
from polybatch.config import ModelSpec
from polybatch.errors import EngineError
from polybatch.execution.page_memory import PageMemory
from polybatch.kernels.lora import AdapterTable


class AdapterMemory:
    """Writes adapters into a pool's pages and makes the tables that `lora` reads them through."""

    def __init__(self, spec: ModelSpec, memory: PageMemory) -> None:
        self._shapes = spec.linear_shapes
        self._memory = memory
        self._layouts: dict[str, AdapterLayout] = {}

    def num_pages(self, weights: AdapterWeights) -> int:
        """Pages that the adapter takes; 0 for one that changes only the vocabulary layers.

        Raises AdapterError if a row does not fit in a page.
        """
        return self._layout(weights).num_pages

    def load(self, weights: AdapterWeights, pages: Sequence[int]) -> None:
        """Write an adapter's rows into these pages. Raises EngineError if they are too few or too many."""
        layout = self._layouts[weights.digest] = self._layout(weights)
        if len(pages) != layout.num_pages:
            raise EngineError(
                f"adapter {weights.digest[:12]} takes {layout.num_pages} pages; the plan gives {len(pages)}: "
                "ask adapter_pages when the adapter is registered"
            )
        for index, deltas in enumerate(weights.layers):
            rows = self._memory.rows(index)
            for module, delta in deltas.items():
                places = layout.layers[index][module]
                parts = {"a": delta.a, "b": delta.b, "gain": delta.gain, "bias": delta.bias}
                for part, values in parts.items():
                    if values is not None:
                        starts = self._starts(places, part, pages)
                        self._scatter(rows, starts, values.reshape(-1, values.shape[-1]))

    def tables(
        self, digests: Sequence[str], resident: Mapping[str, Sequence[int]]
    ) -> list[dict[str, AdapterTable]]:
        """Per layer, module name -> table of these adapters, in order, where at least one changes it.

        resident: digest -> pages. Raises EngineError for an adapter that was never loaded or lacks pages.
        """
        for digest in digests:
            layout = self._layouts.get(digest)
            if layout is None or len(resident.get(digest, ())) != layout.num_pages:
                raise EngineError(
                    f"adapter {digest[:12]} has a chunk but is not resident: the plan must load it and name "
                    "its pages"
                )
        layers = range(self._memory.arena.shape[0]) if digests else ()
        per_layer = []
        for index in layers:
            places = [(self._layouts[d].layers[index], resident.get(d, ())) for d in digests]
            modules = dict.fromkeys(module for held, _ in places for module in held)
            per_layer.append({
                module: self._table(index, module, [(held.get(module), pages) for held, pages in places])
                for module in modules
            })  # fmt: skip
        return per_layer or [{} for _ in range(self._memory.arena.shape[0])]

    def _table(
        self, index: int, module: str, places: Sequence[tuple[ModuleLayout | None, Sequence[int]]]
    ) -> AdapterTable:
        """Table of one module for all adapters of the batch; None stands for one that leaves it alone."""
        device = self._memory.arena.device

        def gather(part: str) -> torch.Tensor:
            starts = [self._starts(held, part, pages) for held, pages in places if held is not None]
            return torch.from_numpy(np.concatenate(starts)).to(device)

        ranks = [0 if held is None else len(held.a_page) for held, _ in places]
        return AdapterTable(
            row_bounds=torch.tensor([0, *np.cumsum(ranks)], device=device),
            a_rows=gather("a"),
            b_rows=gather("b"),
            gain=self._dense(index, module, "gain", places),
            bias=self._dense(index, module, "bias", places),
        )

    def _dense(
        self,
        index: int,
        module: str,
        part: str,
        places: Sequence[tuple[ModuleLayout | None, Sequence[int]]],
    ) -> torch.Tensor | None:
        """[N, out] gains or biases read from the pages, or None where no adapter has one."""
        rows, width = self._memory.rows(index), self._shapes[module][0]
        dense = torch.full((len(places), width), float(part == "gain"), device=rows.device)
        present = False
        for n, (held, pages) in enumerate(places):
            for start in [] if held is None else self._starts(held, part, pages).tolist():
                dense[n] = rows[start : start + width]
                present = True
        return dense if present else None

    def _layout(self, weights: AdapterWeights) -> AdapterLayout:
        ranks = [
            {m: ModuleRows(d.rank, d.gain is not None, d.bias is not None) for m, d in layer.items()}
            for layer in weights.layers
        ]
        itemsize, page_bytes = self._memory.dtype.itemsize, self._memory.arena.shape[2]
        return plan_layout(ranks, self._shapes, itemsize, page_bytes)

    def _starts(self, places: ModuleLayout, part: str, pages: Sequence[int]) -> Int64s:
        """First element of each row of a part in the layer's flat memory; empty where the part is absent."""
        if part == "a":
            page, offset = places.a_page, places.a_offset
        elif part == "b":
            page, offset = places.b_page, places.b_offset
        else:
            place = places.gain if part == "gain" else places.bias
            found = [] if place is None else [place]
            page = np.array([p.page for p in found], np.int32)
            offset = np.array([p.offset for p in found], np.int64)
        first_byte = np.asarray(pages, np.int64)[page] * self._memory.arena.shape[2] + offset
        return first_byte // self._memory.dtype.itemsize

    def _scatter(self, rows: torch.Tensor, starts: Int64s, values: torch.Tensor) -> None:
        """Write values: [rank, width] to `width` elements from each start."""
        columns = torch.arange(values.shape[1], device=rows.device)
        at = torch.from_numpy(starts).to(rows.device)[:, None] + columns
        rows[at] = values.to(rows.device, rows.dtype)
