"""scatter_rows in plain torch; the contract stands in the package's docstring."""

from __future__ import annotations

import torch

PLACE_BYTES = 64


def scatter_rows(
    table: torch.Tensor, data: torch.Tensor, page_ids: torch.Tensor, arena: torch.Tensor, unit: int
) -> None:
    """table: [R, 4]; data: [N]; page_ids: [P]; arena: [layers, pages, elements], changed in place."""
    step = PLACE_BYTES // arena.element_size()
    for source, length, layer, place in table.tolist():
        page, start = divmod(place * step, arena.shape[2])
        row = data[source * unit : (source + length) * unit]
        arena[layer, page_ids[page], start : start + len(row)] = row
