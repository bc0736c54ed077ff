"""Random adapters in NaN-filled memory, as the GPU's `lora` reads them, and the float64 result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polybatch.adapters.layout import ModuleRows, plan_layout
from polybatch.execution.adapter_words import adapter_words
from polybatch.kernels.lora import work
from polybatch.kernels.lora.work import GROUPS, GroupShape, LoraLimits

Rows = dict[str, torch.Tensor]


@dataclass
class World:
    """Adapters of one pool. rows: per layer and adapter, module.part -> values."""

    shapes: dict[str, tuple[int, int]]
    memory: torch.Tensor  # [layers, elements of a layer]
    words: torch.Tensor
    templates: np.ndarray
    rows: list[list[Rows]]

    @property
    def groups(self) -> tuple[GroupShape, ...]:
        return work.group_shapes(self.shapes)


def build_world(shapes, adapters, page_bytes, dtype, generator, device="cpu", scale=1.0):
    """adapters: list of per-layer lists of {module: ModuleRows}. Pages are shuffled, with spare ones."""
    num_layers = len(adapters[0])
    layouts = [plan_layout(ranks, shapes, dtype.itemsize, page_bytes) for ranks in adapters]
    num_pages = sum(layout.num_pages for layout in layouts) + 3
    free = torch.randperm(num_pages, generator=generator).tolist()
    unit = page_bytes // dtype.itemsize
    memory = torch.full((num_layers, num_pages * unit), torch.nan, dtype=dtype)
    words, templates, rows = [], [], [[] for _ in range(num_layers)]
    for layout, ranks in zip(layouts, adapters, strict=True):
        pages = np.array([free.pop() for _ in range(layout.num_pages)], np.int64)
        held = adapter_words(layout)
        templates.append(held.template_at(sum(map(len, words))))
        words.append(held.starts(pages, page_bytes) if held.size else np.zeros(0, np.int32))
        for index, layer in enumerate(ranks):
            mine: Rows = {}
            for module, (rank, *_) in layer.items():
                out, in_ = shapes[module]
                places = layout.layers[index][module]
                parts = {"a": (rank, in_, places.a_page, places.a_offset),
                         "b": (rank, out, places.b_page, places.b_offset)}  # fmt: skip
                for part, place in (("gain", places.gain), ("bias", places.bias)):
                    if place is not None:
                        parts[part] = (1, out, np.array([place.page]), np.array([place.offset]))
                for part, (count, width, page, offset) in parts.items():
                    values = torch.randn(count, width, generator=generator) * scale
                    values = (values / in_**0.5 if part == "a" else values).to(dtype)
                    starts = (pages[page] * page_bytes + offset) // dtype.itemsize if count else []
                    for value, start in zip(values, starts, strict=True):
                        memory[index, int(start) : int(start) + width] = value
                    mine[f"{module}.{part}"] = values
            rows[index].append(mine)
    return World(
        shapes, memory.to(device), torch.from_numpy(np.concatenate(words)).to(device),
        np.stack(templates), rows,
    )  # fmt: skip


def expected_of(world, group, layer, x, y, segments):
    """What `lora` must make of y, in float64."""
    result = y.double().cpu()
    x = x.double().cpu()
    for start, stop, adapter in segments:
        column = 0
        rows = world.rows[layer][adapter]
        for module in GROUPS[group]:
            out = world.shapes[module][0]
            at = (slice(start, stop), slice(column, column + out))
            if f"{module}.a" in rows:
                a, b = rows[f"{module}.a"].double(), rows[f"{module}.b"].double()
                result[at] += x[start:stop] @ a.T @ b
            if f"{module}.gain" in rows:
                result[at] *= rows[f"{module}.gain"].double()
            if f"{module}.bias" in rows:
                result[at] += rows[f"{module}.bias"].double()
            column += out
    return result


def arrays_of(limits: LoraLimits):
    """Fresh views for `work.fill`, full of rubbish."""
    return {name: np.full(shape, 12345, dtype) for name, (shape, dtype) in work.arrays(limits).items()}


def on_device(views, device="cpu"):
    return {name: torch.from_numpy(view.copy()).to(device) for name, view in views.items()}


__all__ = ["ModuleRows", "World", "arrays_of", "build_world", "expected_of", "on_device"]
