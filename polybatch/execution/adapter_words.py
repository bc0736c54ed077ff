"""Where an adapter's rows lie, as the words that the GPU's `lora` kernels read. NumPy only.

    words of one adapter, per layer at a fixed stride (0 where all layers are laid out alike):
        per group: the A rows of its modules; per module: gain, bias, its B rows

each the start of a row, or none. A module takes as many words as its largest layer needs, so that a tile's
record holds for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polybatch.adapters.layout import ALIGN_BYTES, AdapterLayout, ModuleLayout, Place
from polybatch.kernels.lora.work import (
    A_WORD,
    ABSENT,
    GROUPS,
    MODULE,
    MODULE_FIELDS,
    RANK,
    STRIDE,
    TILE_FIELDS,
)

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AdapterWords:
    """pages, offsets: page within the adapter and first byte of each word's row, [layers or 1, words per
    layer], page -1 for none. template: [groups, TILE_FIELDS], words counted from 0.
    """

    pages: Int32s
    offsets: Int64s
    template: Int32s

    @property
    def size(self) -> int:
        return self.pages.size

    def starts(self, page_ids: Int64s, page_bytes: int) -> Int32s:
        """Words for an adapter in these pages: row starts in units of 64 bytes, or ABSENT; flat."""
        first_byte = page_ids[self.pages] * page_bytes + self.offsets
        return np.where(self.pages < 0, ABSENT, first_byte // ALIGN_BYTES).astype(np.int32).reshape(-1)

    def template_at(self, word: int) -> Int32s:
        """The template for words that begin at `word`."""
        template = self.template.copy()
        template[:, A_WORD] += word
        b_words = template[:, MODULE : MODULE + MODULE_FIELDS * 3 : MODULE_FIELDS]
        b_words[b_words != ABSENT] += word
        return template


def adapter_words(layout: AdapterLayout) -> AdapterWords:
    """Words of an adapter of this layout; none at all for one without rows."""
    is_uniform = all(layer is layout.layers[0] for layer in layout.layers)
    layers = layout.layers[:1] if is_uniform else layout.layers
    columns: list[list[list[Place | None]]] = []
    template = np.zeros((len(GROUPS), TILE_FIELDS), np.int32)
    size = 0
    for group, modules in enumerate(GROUPS):
        held = [[layer.get(module) for layer in layers] for module in modules]
        ranks = [max(len(places.a_page) if places else 0 for places in per_layer) for per_layer in held]
        template[group, A_WORD], template[group, RANK] = size, sum(ranks)
        for per_layer, rank in zip(held, ranks, strict=True):
            columns.append([_padded(_rows(places, "a"), rank) for places in per_layer])
        size += sum(ranks)
        for slot in range(3):
            field = MODULE + MODULE_FIELDS * slot
            per_layer = held[slot] if slot < len(modules) else []
            if not any(_is_effective(places) for places in per_layer):
                template[group, field] = ABSENT
                continue
            template[group, field : field + MODULE_FIELDS] = size, ranks[slot], sum(ranks[:slot])
            columns.append([
                [places.gain if places else None, places.bias if places else None,
                 *_padded(_rows(places, "b"), ranks[slot])]
                for places in per_layer
            ])  # fmt: skip
            size += 2 + ranks[slot]
    template[:, STRIDE] = 0 if is_uniform else size
    flat = [place for layer in range(len(layers)) for column in columns for place in column[layer]]
    pages = np.array([-1 if place is None else place.page for place in flat], np.int32)
    offsets = np.array([0 if place is None else place.offset for place in flat], np.int64)
    return AdapterWords(pages.reshape(len(layers), size), offsets.reshape(len(layers), size), template)


def _is_effective(places: ModuleLayout | None) -> bool:
    return places is not None and (
        len(places.a_page) > 0 or places.gain is not None or places.bias is not None
    )


def _rows(places: ModuleLayout | None, part: str) -> list[Place]:
    if places is None:
        return []
    page, offset = (places.a_page, places.a_offset) if part == "a" else (places.b_page, places.b_offset)
    return [Place(p, o) for p, o in zip(page.tolist(), offset.tolist(), strict=True)]


def _padded(rows: list[Place], rank: int) -> list[Place | None]:
    return [*rows, *[None] * (rank - len(rows))]


__all__ = ["AdapterWords", "adapter_words"]
