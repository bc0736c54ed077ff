"""What the tests of compiled operations share: running one, and memory that shows what nobody wrote."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from polybatch.kernels.cpu.compile import detect_isa
from polybatch.kernels.cpu.layout import STATE_SIZE
from polybatch.kernels.cpu.memory import aligned_bytes
from polybatch.kernels.cpu.team import ARGS, Program, Team

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def isa_params():
    """The detected instruction set, and the generic one as a slow test where it is another."""
    if detect_isa() == "generic":
        return ["generic"]
    return [detect_isa(), pytest.param("generic", marks=pytest.mark.slow)]


@functools.cache
def team(num_threads=1):
    return Team(num_threads)


def run_operation(function, args, state, num_threads=1):
    """Run one operation. args, state: values by index."""
    row = [0] * (max(args) - ARGS + 1)
    for index, value in args.items():
        row[index - ARGS] = value
    numbers = np.zeros(STATE_SIZE, dtype=np.int64)
    for index, value in state.items():
        numbers[index] = value
    team(num_threads).run(Program([(function, row)]), numbers.ctypes.data)


def nan_rows(rows, width, dtype):
    """Fresh memory as every operation finds it at worst: [rows, width] of NaN."""
    item = DTYPES[dtype].itemsize
    memory = aligned_bytes(max(rows, 1) * width * item)
    memory.fill_(0xFF)
    return memory.view(DTYPES[dtype]).view(-1, width)[:rows]


def zero_padded(x, width, dtype):
    """x: [rows, n] -> [rows, width], as activation buffers hold it."""
    rows = aligned_bytes(max(len(x), 1) * width * DTYPES[dtype].itemsize).view(DTYPES[dtype])
    rows = rows.view(-1, width)[: len(x)]
    rows[:, : x.shape[1]] = x
    return rows


def constant(values, slack=32):
    """float32 values with zeros behind them."""
    memory = aligned_bytes(4 * (values.numel() + slack)).view(torch.float32)
    memory[: values.numel()] = values.reshape(-1)
    return memory


def int32(values):
    return torch.tensor(values, dtype=torch.int32)
