"""LLVM vector code from Python: what the micro-kernels are made of.

A micro-kernel is written as a Python function that emits LLVM instructions through `Emitter` and is
callable from numba code as an ordinary function over 64-bit addresses (`micro_kernel`). Registers
are blocked by plain Python loops at emission time. Vectors always have 16 lanes of 32 bits;
LLVM splits them where the machine's registers are narrower, so every kernel runs on every CPU.

No reassociation is ever allowed: each output element is accumulated in an order that depends on
its own row alone, which is what makes results independent of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from polybatch.kernels.cpu.compile import Deferred

LANES = 16
VECTOR_BYTES = 64

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32 = ir.FloatType()
V_F32 = ir.VectorType(F32, LANES)
V_I32 = ir.VectorType(I32, LANES)
V_I16 = ir.VectorType(I16, LANES)
V_I8 = ir.VectorType(I8, LANES)
V_I1 = ir.VectorType(ir.IntType(1), LANES)


class _BFloat(ir.Type):  # type: ignore[misc]
    """llvmlite has no bfloat; the type is needed only to name the dot-product instruction."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


V_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)

# exp2 on [-0.5, 0.5]: minimax polynomial, relative error below 3e-7.
_EXP2 = (1.0, 0.6931472, 0.24022651, 0.05550411, 0.009618129, 0.0013333558, 0.00015403530)
LOG2_E = 1.4426950408889634


def insert_function(module: Any, kind: Any, name: str) -> Any:
    """Declaration of an LLVM intrinsic or C function, one per module."""
    # numba's own helpers are untyped
    from numba.core import cgutils

    insert: Any = cgutils.get_or_insert_function
    return insert(module, kind, name)


class Emitter:
    """Thin vocabulary over an llvmlite builder; every value is an LLVM value, addresses are i64."""

    def __init__(self, builder: Any, isa: str) -> None:
        self.b = builder
        self.isa = isa

    # scalars and control flow
    def i64(self, value: int) -> Any:
        return ir.Constant(I64, value)

    def f32(self, value: float) -> Any:
        return ir.Constant(F32, value)

    def add(self, x: Any, y: Any) -> Any:
        return self.b.add(x, self.i64(y) if isinstance(y, int) else y)

    def mul(self, x: Any, y: Any) -> Any:
        return self.b.mul(x, self.i64(y) if isinstance(y, int) else y)

    def loop(self, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """`for i in range(count)` that carries values; count is an i64 and may be zero."""
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(self.i64(0), before)
        phis = [b.phi(value.type) for value in carried]
        for phi, value in zip(phis, carried, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", index, count), inside, after)
        b.position_at_end(inside)
        results = body(index, list(phis))
        bottom = b.block
        index.add_incoming(b.add(index, self.i64(1)), bottom)
        for phi, value in zip(phis, results, strict=True):
            phi.add_incoming(value, bottom)
        b.branch(head)
        b.position_at_end(after)
        return list(phis)

    def intrinsic(self, name: str, result: Any, args: list[Any]) -> Any:
        kind = ir.FunctionType(result, [a.type for a in args])
        return self.b.call(insert_function(self.b.module, kind, name), args)

    # memory
    def load(self, address: Any, kind: Any, align: int = 1) -> Any:
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 1) -> None:
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=align)

    def prefetch(self, address: Any) -> None:
        """Ask for the cache line at `address`, into the second level; never faults."""
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        name = "llvm.prefetch.p0"
        function = insert_function(self.b.module, kind, name)
        pointer = self.b.inttoptr(address, I8.as_pointer())
        self.b.call(function, [pointer, *(ir.Constant(I32, v) for v in (0, 2, 1))])

    # vectors
    def zeros(self, kind: Any = V_F32) -> Any:
        return ir.Constant(kind, None)

    def splat(self, scalar: Any) -> Any:
        kind = ir.VectorType(scalar.type, LANES)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(V_I32, [0] * LANES))

    def constant(self, value: float | int, kind: Any = V_F32) -> Any:
        return ir.Constant(kind, [value] * LANES)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.intrinsic("llvm.fma.v16f32", V_F32, [x, y, z])

    def maximum(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def bf16_to_f32(self, halves: Any) -> Any:
        """<16 x i16> holding bfloat16 -> <16 x float>, exactly."""
        wide = self.b.zext(halves, V_I32)
        return self.b.bitcast(self.b.shl(wide, self.constant(16, V_I32)), V_F32)

    def f32_to_bf16(self, x: Any) -> Any:
        """<16 x float> -> <16 x i16>, round to nearest even; finite values only."""
        bits = self.b.bitcast(x, V_I32)
        odd = self.b.and_(self.b.lshr(bits, self.constant(16, V_I32)), self.constant(1, V_I32))
        rounded = self.b.add(self.b.add(bits, self.constant(0x7FFF, V_I32)), odd)
        return self.b.trunc(self.b.lshr(rounded, self.constant(16, V_I32)), V_I16)

    def load_f32(self, address: Any, dtype: str) -> Any:
        """16 stored elements of "float32" or "bfloat16" as <16 x float>."""
        if dtype == "float32":
            return self.load(address, V_F32, 4)
        return self.bf16_to_f32(self.load(address, V_I16, 2))

    def store_as(self, x: Any, address: Any, dtype: str) -> None:
        if dtype == "float32":
            self.store(x, address, 4)
        else:
            self.store(self.f32_to_bf16(x), address, 2)

    def reduce_add(self, x: Any) -> Any:
        """Sum of the lanes as a fixed tree."""
        for half in (8, 4, 2, 1):
            mask = [(i + half) % LANES for i in range(LANES)]
            other = self.b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), ir.Constant(V_I32, mask))
            x = self.b.fadd(x, other) if x.type == V_F32 else self.b.add(x, other)
        return self.b.extract_element(x, ir.Constant(I32, 0))

    def reduce_max(self, x: Any) -> Any:
        for half in (8, 4, 2, 1):
            mask = [(i + half) % LANES for i in range(LANES)]
            other = self.b.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), ir.Constant(V_I32, mask))
            x = self.maximum(x, other)
        return self.b.extract_element(x, ir.Constant(I32, 0))

    def round(self, x: Any) -> Any:
        """Nearest integer, ties to even, still as float."""
        return self.intrinsic("llvm.rint.v16f32", V_F32, [x])

    def exp2(self, x: Any) -> Any:
        """2**x for lanes in [-inf, 126]; below -126 the result is 0."""
        b = self.b
        low = self.constant(-126.0)
        is_tiny = b.fcmp_unordered("<", x, low)
        x = b.select(is_tiny, low, x)
        whole = self.round(x)
        f = b.fsub(x, whole)
        p = self.constant(_EXP2[-1])
        for c in _EXP2[-2::-1]:
            p = self.fma(p, f, self.constant(c))
        exponent = b.shl(b.fptosi(whole, V_I32), self.constant(23, V_I32))
        scaled = b.bitcast(b.add(b.bitcast(p, V_I32), exponent), V_F32)
        return b.select(is_tiny, self.zeros(), scaled)

    def silu(self, x: Any) -> Any:
        """x / (1 + exp(-x)). The clamp keeps exp2 in range; silu(-87) is 0 in float32 but for rounding."""
        b = self.b
        bound = self.constant(87.0)
        clamped = b.select(b.fcmp_ordered("<", x, self.constant(-87.0)), self.constant(-87.0), x)
        clamped = b.select(b.fcmp_ordered(">", clamped, bound), bound, clamped)
        e = self.exp2(b.fmul(clamped, self.constant(-LOG2_E)))
        return b.fdiv(x, b.fadd(e, self.constant(1.0)))

    # dot products on packed 32-bit lanes
    def dot(self, acc: Any, a: Any, b: Any, kind: str) -> Any:
        """acc + the products packed in each 32-bit lane of a and b, both <16 x i32>.

        kind: "float32" (one product), "bfloat16" (two), "int8" (four; a unsigned, b signed;
        acc is <16 x i32>). The lanes' own instructions are used where the machine has them.
        """
        if kind == "float32":
            return self.fma(self.b.bitcast(a, V_F32), self.b.bitcast(b, V_F32), acc)
        if kind == "bfloat16":
            return self._dot_bf16(acc, a, b)
        return self._dot_int8(acc, a, b)

    def _dot_bf16(self, acc: Any, a: Any, b: Any) -> Any:
        if self.isa == "avx512":
            pairs = [self.b.bitcast(v, V_PAIRS) for v in (a, b)]
            return self.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", V_F32, [acc, *pairs])
        for shift in (True, False):
            if shift:
                parts = [self.b.shl(v, self.constant(16, V_I32)) for v in (a, b)]
            else:
                parts = [self.b.and_(v, self.constant(0xFFFF0000 - 2**32, V_I32)) for v in (a, b)]
            acc = self.fma(self.b.bitcast(parts[0], V_F32), self.b.bitcast(parts[1], V_F32), acc)
        return acc

    def _dot_int8(self, acc: Any, a: Any, b: Any) -> Any:
        if self.isa == "avx512":
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.512", V_I32, [acc, a, b])
        for byte in range(4):
            x = self.b.and_(self.b.lshr(a, self.constant(8 * byte, V_I32)), self.constant(255, V_I32))
            y = self.b.ashr(self.b.shl(b, self.constant(24 - 8 * byte, V_I32)), self.constant(24, V_I32))
            acc = self.b.add(acc, self.b.mul(x, y))
        return acc


def micro_kernel(num_args: int, emit: Callable[[Emitter, list[Any]], None], isa: str) -> Deferred:
    """A numba-callable function of `num_args` int64 arguments whose body is emitted by `emit`."""

    def make() -> Any:
        from numba.core import types
        from numba.extending import intrinsic

        def micro(typing_context: Any, *args: Any) -> Any:
            signature = types.void(*([types.int64] * num_args))

            def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
                emit(Emitter(builder, isa), list(values))
                return context.get_dummy_value()

            return signature, codegen

        # numba reads an intrinsic's arity from its Python signature
        kind = inspect.Parameter.POSITIONAL_ONLY
        names = ["typing_context", *(f"x{i}" for i in range(num_args))]
        micro.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        return intrinsic(micro)

    return Deferred(make)
