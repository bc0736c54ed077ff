"""What the compiled kernels of a program agree on: the step's state and the shapes of buffers.

Rows of every activation buffer are padded with zeros to a multiple of `COLUMNS` elements, so that no kernel
ever has a ragged edge along a row; the token axis is never padded.
"""

from __future__ import annotations

COLUMNS = 64
"""Output columns of a packed weight panel, and the padding of activation rows, in elements."""
PAGE_TOKENS = 16
"""Tokens of a KV page: one per vector lane."""
ROWS = 6
"""Rows of a matmul register tile."""

# Indices into the step's state (int64).
NUM_TOKENS = 0
NUM_LOGITS = 1
NUM_RUNS = 2
NUM_TILES = 3
NUM_SEGMENTS = 4
STATE_SIZE = 16

# An adapter's table (int64): [layer][module][field], one per resident adapter.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FIELDS = 6
RANK, A_ROWS, B_ROWS, GAIN, BIAS, H_OFFSET = range(FIELDS)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def padded(size: int, multiple: int = COLUMNS) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple
