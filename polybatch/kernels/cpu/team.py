"""A team of threads that runs a program of operations as one compiled call.

Every thread walks the same table of operations. Inside an operation threads claim units of work from
one atomic counter and report them done on another; an operation is over when all its units are done,
whoever did them, so a thread that the system has put aside holds nobody up unless it sits on a unit.
Only at a program's end do all threads meet, at a barrier that counts up and never needs a reset.
Threads sleep between programs and spin inside one, yielding the processor when a wait gets long.

An operation's row in the table is int64 [function address, counter address, argument 0, 1, …]; the
state of a step is int64 too, and what its entries mean is `layout.py`'s to say.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir

from polybatch.errors import EngineError
from polybatch.kernels.cpu.compile import Deferred, compile_function, inner_function
from polybatch.kernels.cpu.emit import insert_function

ROW = 32
"""int64 values in an operation's row."""
ARGS = 2
"""Index of an operation's first own argument in its row."""
COUNTER_STRIDE = 8
"""int64 values between tile counters: a cache line each."""

_I64 = ir.IntType(64)


class _NumbaTypes:
    """`numba.core.types`, imported when a typer first asks for one of them."""

    def __getattr__(self, name: str) -> Any:
        from numba.core import types

        return getattr(types, name)


types = _NumbaTypes()


def device_function(typer: Callable[..., Any], **options: Any) -> Any:
    """numba's `intrinsic`: a function for compiled code, made of the LLVM that the typer's codegen emits."""

    def make() -> Any:
        from numba.extending import intrinsic

        return intrinsic(**options)(typer) if options else intrinsic(typer)

    return Deferred(make)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@device_function
def load_i64(typing_context: Any, address: Any, index: Any) -> Any:
    """int64 number `index` of the array at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.mul(args[1], ir.Constant(_I64, 8))
        return builder.load(_pointer(builder, builder.add(args[0], offset), _I64))

    return types.int64(types.int64, types.int64), codegen


@device_function
def load_i32(typing_context: Any, address: Any, index: Any) -> Any:
    """int32 number `index` of the array at `address`, widened."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.mul(args[1], ir.Constant(_I64, 4))
        value = builder.load(_pointer(builder, builder.add(args[0], offset), ir.IntType(32)))
        return builder.sext(value, _I64)

    return types.int64(types.int64, types.int64), codegen


@device_function
def load_f32(typing_context: Any, address: Any, index: Any) -> Any:
    """float32 number `index` of the array at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.mul(args[1], ir.Constant(_I64, 4))
        return builder.load(_pointer(builder, builder.add(args[0], offset), ir.FloatType()))

    return types.float32(types.int64, types.int64), codegen


@device_function
def store_f32(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Put float32 `value` at number `index` of the array at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.mul(args[1], ir.Constant(_I64, 4))
        builder.store(args[2], _pointer(builder, builder.add(args[0], offset), ir.FloatType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@device_function
def store_i64(typing_context: Any, address: Any, index: Any, value: Any) -> Any:
    """Put int64 `value` at number `index` of the array at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        offset = builder.mul(args[1], ir.Constant(_I64, 8))
        builder.store(args[2], _pointer(builder, builder.add(args[0], offset), _I64))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@functools.partial(device_function, prefer_literal=True)
def stack_bytes(typing_context: Any, size: Any) -> Any:
    """Address of `size` bytes (a literal) of 64-byte aligned stack, reserved at function entry."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    count = size.literal_value

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        with builder.goto_entry_block():
            slot = builder.alloca(ir.ArrayType(ir.IntType(8), count))
            slot.align = 64
        return builder.ptrtoint(slot, _I64)

    return types.int64(size), codegen


@device_function
def claim(typing_context: Any, address: Any) -> Any:
    """Atomically take the next number from the counter at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, args[0], _I64), ir.Constant(_I64, 1), "acq_rel")

    return types.int64(types.int64), codegen


@device_function
def report_done(typing_context: Any, address: Any) -> Any:
    """Atomically count one unit as done, on the counter behind the one at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        done = _pointer(builder, builder.add(args[0], ir.Constant(_I64, 8)), _I64)
        builder.atomic_rmw("add", done, ir.Constant(_I64, 1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@device_function
def load_acquire(typing_context: Any, address: Any) -> Any:
    """Atomically read the int64 at `address`."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], _I64), "acquire", 8)

    return types.int64(types.int64), codegen


@device_function
def relax(typing_context: Any) -> Any:
    """Tell the processor that this is a spin loop."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if builder.module.triple.startswith("x86"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@device_function
def yield_processor(typing_context: Any) -> Any:
    """sched_yield(2): let another thread run."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@device_function
def call_operation(
    typing_context: Any, function: Any, args: Any, state: Any, tid: Any, num_threads: Any
) -> Any:
    """Call the compiled operation at address `function`."""

    def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 4)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), list(values[1:]))
        return context.get_dummy_value()

    return types.void(*([types.int64] * 5)), codegen


_ROW_BYTES = ROW * 8
_SPINS = 2000


def _wait_until(address: int, target: int) -> None:
    """Spin until the int64 at `address` has reached `target`."""
    spins = 0
    while load_acquire(address) < target:
        relax()
        spins += 1
        if spins > _SPINS:
            yield_processor()


wait_until: Any = inner_function(_wait_until, {}, "all")


def _await_units(args: int, num_units: int) -> None:
    """End of an operation: wait until all of its units are done. args: address of its row."""
    wait_until(load_i64(args, 1) + 8, num_units)


await_units: Any = inner_function(_await_units, {}, "all")


def _walk(ops: int, num_ops: int, state: int, barrier: int, met: int, tid: int, num_threads: int) -> None:
    for i in range(num_ops):
        row = ops + i * _ROW_BYTES
        call_operation(load_i64(row, 0), row, state, tid, num_threads)
    claim(barrier)
    wait_until(barrier, met + num_threads)


class Program:
    """A table of operations with their tile counters. Addresses inside stay valid while it lives."""

    def __init__(self, operations: list[tuple[int, list[int]]]) -> None:
        """operations: (address of the compiled function, its int64 arguments), in order."""
        self.num_ops = len(operations)
        self.table = np.zeros((max(1, self.num_ops), ROW), dtype=np.int64)
        self.counters = np.zeros(max(1, self.num_ops) * COUNTER_STRIDE, dtype=np.int64)
        base = self.counters.ctypes.data
        for i, (function, args) in enumerate(operations):
            if len(args) > ROW - ARGS:
                raise EngineError(f"an operation has {len(args)} arguments; a row takes {ROW - ARGS}")
            self.table[i, 0] = function
            self.table[i, 1] = base + i * COUNTER_STRIDE * 8
            self.table[i, ARGS : ARGS + len(args)] = args
        self.address = self.table.ctypes.data


def compile_walk() -> int:
    """Address of the loop over a program's operations."""
    return compile_function("walk", _walk, num_args=7)


class Team:
    """`num_threads` threads, the caller's among them, that run programs together."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._barrier = np.zeros(COUNTER_STRIDE, dtype=np.int64)
        self._met = 0
        self._job: tuple[int, int, int, int] | None = None
        self._closed = False
        self._walk = ctypes.CFUNCTYPE(None, *([ctypes.c_int64] * 7))(compile_walk())
        self._starts = [threading.Semaphore(0) for _ in range(num_threads - 1)]
        self._threads = [
            threading.Thread(target=self._work, args=(tid, start), name=f"polybatch-{tid}", daemon=True)
            for tid, start in enumerate(self._starts, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, program: Program, state: int, first: int = 0, last: int | None = None) -> None:
        """Run operations first … last - 1 (all) on every thread; returns when they are done.

        state: address of the step's state. Raises EngineError once the team is closed.
        """
        if self._closed:
            raise EngineError("the team of threads is closed; a program needs a new one")
        num_ops = (program.num_ops if last is None else last) - first
        # without a barrier a late worker could miss this program and run the next one twice
        if num_ops <= 0:
            return
        program.counters.fill(0)
        job = (program.address + first * _ROW_BYTES, num_ops, state, self._met)
        self._met += self.num_threads
        self._job = job
        for start in self._starts:
            start.release()
        self._run_as(0, job)

    def _run_as(self, tid: int, job: tuple[int, int, int, int]) -> None:
        address, num_ops, state, met = job
        self._walk(address, num_ops, state, self._barrier.ctypes.data, met, tid, self.num_threads)

    def _work(self, tid: int, start: threading.Semaphore) -> None:
        while True:
            start.acquire()
            if self._closed or self._job is None:
                return
            self._run_as(tid, self._job)

    def close(self) -> None:
        """End the worker threads. Idempotent."""
        if not self._closed:
            self._closed = True
            for start in self._starts:
                start.release()
            for thread in self._threads:
                thread.join()
