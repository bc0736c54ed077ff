"""A step's only adapter inside the base model's products: planning. NumPy only.

    y = W x + B h = [W, B] [x, h],  h = A x

Every weight matrix has SPARE columns more, every input of a product as many elements per row. While
one adapter is *carried*, its B stands in those columns and its h in those elements, so that the base product
adds the adapter on the way, and no kernel that follows knows of it. Rows without the adapter have h = 0.

Spare columns come in blocks of BLOCK, and an adapter takes as many as its rows of A in the group need. If
that leaves room, B stands there several times, each time for a part of the inputs: h = A x is a sum over
parts, which the product adds up too, so that more programs share the work without adding up anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from polybatch.kernels.lora.work import GROUPS, RANK, TILE_FIELDS, Int32Array

SPARE = (128, 64, 64, 128)
"""Spare columns of each group's weights, in units of what a product's kernel takes at a time. More where
inputs are long, or modules many, and the weights are not: rank 16 has at least two parts then.
"""

BLOCK = 16

# Fields of `carried` before the records of the groups: the adapter's first row of the step, the one after its
# last.
FIRST_ROW, LAST_ROW, RECORDS = 0, 1, 2

MIN_ROWS, MIN_SHARE = 96, 0.25
"""Of the adapter, and of a step's rows: with fewer, h costs more than adding B h apart, or the wider product
costs the others more than it saves."""


def arrays() -> dict[str, tuple[tuple[int, ...], type[np.int32]]]:
    """Name -> (shape, dtype) of what `fill` writes and the kernels read."""
    return {"lora_carried": ((RECORDS + len(GROUPS) * TILE_FIELDS,), np.int32)}


def fits(template: Int32Array) -> bool:
    """Whether the columns hold an adapter of these ranks. template: [groups, TILE_FIELDS]."""
    return bool((template[:, RANK] <= SPARE).all())


def pays(num_rows: int, num_own: int) -> bool:
    """Whether carrying the adapter of num_own rows of a step takes less time than adding it to them."""
    return num_own >= max(MIN_ROWS, MIN_SHARE * num_rows)


def fill(
    views: Mapping[str, np.ndarray[Any, Any]], first_row: int, last_row: int, template: Int32Array
) -> None:
    """Say which rows are the carried adapter's, and where its words are."""
    view = views["lora_carried"]
    view[FIRST_ROW], view[LAST_ROW] = first_row, last_row
    view[RECORDS:] = template.reshape(-1)
