"""Low-precision linear layers at the four fused shapes of Llama-3.1-8B, against cuBLAS in bfloat16.

    python -m benchmarks.cuda.linear [--quick] [--out linear.json]

Claim: with 4-bit weights a layer's linears take at most 1/3.3 of cuBLAS's time at 1 to 16 tokens, 1/3 at 32,
1/2 at 64 and 1/1.3 at 128. First every kernel is held to a float64 product (fresh random inputs, outputs full
of NaN); nothing is timed unless all agree. A time is the median replay of a CUDA graph over as many copies
of a layer as overflow the cache several times. For each shape and number of tokens the fastest of a grid of
configurations stands beside the one that `int4_config` picks. The bandwidth is weights, scales,
inputs and outputs once each over the time, in percent of READ_GBS, measured on such a card. "early" is
programmatic dependent launch: a program starts while the kernel before it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton

from polybatch.kernels.linear.cuda import (
    FUSED_TOKENS,
    Fp8Linear,
    Int4Config,
    Int4Linear,
    LinearWorkspace,
    int4_config,
    pack,
)
from polybatch.kernels.linear.cuda_pack import Int4Layout, pack_int4
from polybatch.kernels.linear.quantize_symmetric import (
    QuantizedTensor,
    dequantize_symmetric,
    quantize_fp8,
    quantize_int4_symmetric,
)

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)
PREFILL_TOKENS = (1024, 2048, 8192)
BARS = {1: 3.3, 8: 3.3, 16: 3.3, 32: 3.0, 64: 2.0, 128: 1.3}
READ_GBS = 3090.0
LAYERS = 32
CHECKED_TOKENS = (1, 3, 16, 17, 33, 64, 100, 128, 200, 512, 700)
EARLY_TOKENS = 64
COLD_BYTES = 200 << 20
Run = Callable[[torch.Tensor], object]
# Tile of tokens -> tiles of rows, warps, stages.
TILES = {
    16: ((64, 4, 4), (64, 4, 5), (128, 4, 4), (128, 8, 4)),
    32: ((64, 4, 4), (128, 8, 4), (128, 4, 4)),
    64: ((64, 4, 3), (128, 8, 3), (128, 8, 2)),
    128: ((128, 8, 3), (128, 8, 2)),
}
PROGRAMS = (0, 132, 264, 396, 528)
"""Wanted in all; the inputs are split to come near. 0: not split."""


@dataclass(frozen=True, slots=True)
class Timing:
    shape: str
    tokens: int
    kind: str
    us: float
    config: Int4Config | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A weight whose products are checked; for some numbers of tokens, in every configuration."""

    out: int
    inputs: int
    group: int | None
    zeros: bool
    dtype: torch.dtype
    all_configs: tuple[int, ...] = ()


CASES = (
    Case(6144, 4096, 128, False, torch.bfloat16, (3, 17, 33, 128)),
    Case(4096, 14336, 128, False, torch.bfloat16),
    Case(520, 1096, 128, True, torch.bfloat16),
    Case(1000, 648, None, False, torch.float16),
    Case(392, 2056, 256, True, torch.float16),
)


def candidates(tokens: int, layout: Int4Layout) -> list[Int4Config]:
    """The grid for a number of tokens, without repetitions."""
    sizes = [size for size in TILES if size >= min(tokens, 64)][: 2 if tokens > 64 else 1]
    found: dict[Int4Config, None] = {}
    for block_m in sizes:
        for block_out, warps, stages in TILES[block_m]:
            programs = layout.rows // block_out * -(-tokens // block_m)
            for wanted in PROGRAMS if tokens <= 128 else (0,):
                split = max(1, min(round(wanted / programs), layout.k_tiles // 2))
                found[Int4Config(block_m, block_out, split, warps, stages)] = None
    return list(found)


def random_layout(out: int, inputs: int) -> Int4Layout:
    """Packed weights nobody rounded: for times, where the values only must not be special."""
    words = torch.randint(-(2**15), 2**15, (inputs // 256, out, 64), dtype=torch.int16, device="cuda")
    scales = torch.rand(inputs // 256 + 1, out, 2, device="cuda") * 0.01 + 0.001
    packed = scales.half().view(torch.int32).squeeze(2)
    return Int4Layout(out, inputs, words, packed, None, True, False)


def time_us(calls: list[Callable[[], object]], repeats: int) -> float:
    """Median microseconds per call, all captured in one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times[2:])


class Comparison:
    """Counts products held to a float64 one, and keeps those that disagree."""

    def __init__(self) -> None:
        self.compared = 0
        self.wrong: list[str] = []

    def hold(self, name: str, run: Run, expected: torch.Tensor, dtype: torch.dtype, limit: float) -> None:
        """Run into a view of a wider buffer full of NaN."""
        tokens, out = expected.shape
        wide = torch.full((tokens, out + 32), float("nan"), dtype=dtype, device="cuda")
        run(wide[:, 16:-16])
        error = float((wide[:, 16:-16].double() - expected).norm() / expected.norm())
        untouched = bool(wide[:, :16].isnan().all() and wide[:, -16:].isnan().all())
        self.compared += 1
        if not error < limit or not untouched:
            self.wrong.append(f"{name}: relative error {error:.2e}, outside untouched: {untouched}")


def check_int4(comparison: Comparison, case: Case) -> None:
    weight = quantize_int4_symmetric(torch.randn(case.out, case.inputs, device="cuda"), case.group)
    if case.zeros:
        table = torch.randint(0, 17, weight.scales.shape, device="cuda", dtype=torch.uint8)
        weight = QuantizedTensor("int4", weight.values, weight.scales.half(), table, weight.group_size)
    exact = dequantize_symmetric(weight).double().T
    layout = pack_int4(weight)
    linear = Int4Linear(layout, LinearWorkspace("cuda", case.dtype, 4096))
    limit = 6e-3 if case.dtype == torch.bfloat16 else 1e-3
    for tokens in CHECKED_TOKENS:
        x = torch.randn(tokens, case.inputs, device="cuda").to(case.dtype)
        expected = x.double() @ exact
        label = f"int4 {case} M {tokens}"
        comparison.hold(label, partial(linear.forward, x), expected, case.dtype, limit)
        if tokens > FUSED_TOKENS:
            config = int4_config(tokens, layout.rows, layout.k_tiles)
            run = fused(linear, x, config)
            comparison.hold(f"{label} fused", run, expected, case.dtype, limit)
        elif tokens in case.all_configs:
            for config in configs_to_check(tokens, layout):
                run = fused(linear, x, config)
                comparison.hold(f"{label} {config}", run, expected, case.dtype, limit)


def configs_to_check(tokens: int, layout: Int4Layout) -> list[Int4Config]:
    """The grid, and the same with early launches where they are timed."""
    configs = candidates(tokens, layout)
    return configs + [replace(c, is_dependent=True) for c in configs if tokens <= EARLY_TOKENS]


def compile_all() -> None:
    """Compile what will be checked and timed, on all processors at once."""
    with triton.AsyncCompileMode(ThreadPoolExecutor(os.cpu_count())):
        for case in CASES:
            weight = quantize_int4_symmetric(torch.randn(case.out, case.inputs, device="cuda"), case.group)
            zeros = torch.zeros_like(weight.scales, dtype=torch.uint8) if case.zeros else None
            scales = weight.scales.half() if case.zeros else weight.scales
            layout = pack_int4(QuantizedTensor("int4", weight.values, scales, zeros, weight.group_size))
            linear = Int4Linear(layout, LinearWorkspace("cuda", case.dtype, 4096))
            x = torch.empty(512, case.inputs, device="cuda", dtype=case.dtype)
            out = torch.empty(512, case.out + 32, device="cuda", dtype=case.dtype)[:, 16:-16]
            for tokens in CHECKED_TOKENS:
                configs = [int4_config(tokens, layout.rows, layout.k_tiles)]
                if tokens in case.all_configs:
                    configs += configs_to_check(tokens, layout)
                for config in configs:
                    linear.compile_fused(x, out, config)


def fused(linear: Int4Linear, x: torch.Tensor, config: Int4Config) -> Run:
    linear.reserve([(x.shape[0], config)])
    return lambda y: linear.forward_fused(x, y, config)


def check_fp8(comparison: Comparison) -> None:
    weight = quantize_fp8(torch.randn(6144, 4096, device="cuda"))
    fp8 = Fp8Linear(weight, LinearWorkspace("cuda", torch.bfloat16, 1024))
    rounded = dequantize_symmetric(weight).double().T
    for tokens in (1, 3, 17, 64, 1000):
        x = torch.randn(tokens, 4096, device="cuda").bfloat16()
        values, scales = fp8.quantize(x)
        wide = values.float() * scales
        # Three bits of mantissa: a relative error of 2^-4 at most, about a third of that on average.
        comparison.hold(f"fp8 rounding M {tokens}", wide_copy(wide), x.double(), torch.bfloat16, 0.04)
        expected = wide.double() @ rounded
        comparison.hold(f"fp8 M {tokens}", partial(fp8.forward, x), expected, torch.bfloat16, 6e-3)


def wide_copy(values: torch.Tensor) -> Run:
    return lambda y: y.copy_(values)


class Shape:
    """Copies of one layer in every precision, enough of them to overflow the cache."""

    def __init__(self, name: str) -> None:
        out, inputs = SHAPES[name]
        self.name = name
        workspace = LinearWorkspace("cuda", torch.bfloat16, max(PREFILL_TOKENS))
        copies = max(2, -(-COLD_BYTES // (out * inputs // 2)))
        self.int4 = [Int4Linear(random_layout(out, inputs), workspace) for _ in range(copies)]
        few = max(2, -(-COLD_BYTES // (out * inputs)))
        weights = [torch.randn(out, inputs, device="cuda").bfloat16() * 0.02 for _ in range(few)]
        self.plain = [pack(w, None, workspace) for w in weights]
        self.fp8 = [pack(w, "fp8", workspace) for w in weights]

    def measure(self, tokens: int, repeats: int) -> list[Timing]:
        out, inputs = SHAPES[self.name]
        x = torch.randn(tokens, inputs, device="cuda").bfloat16()
        y = torch.empty(tokens, out, device="cuda", dtype=torch.bfloat16)
        timings: list[Timing] = []

        def time_all(kind: str, runs: list[Run], config: Int4Config | None = None) -> Timing:
            us = time_us([partial(run, y) for run in runs], repeats)
            timings.append(Timing(self.name, tokens, kind, us, config))
            return timings[-1]

        time_all("cublas", [partial(linear.forward, x) for linear in self.plain])
        time_all("fp8", [partial(linear.forward, x) for linear in self.fp8])
        if tokens > FUSED_TOKENS:
            layout = self.int4[0].layout
            config = int4_config(tokens, layout.rows, layout.k_tiles)
            time_all("int4 chosen", [partial(linear.forward, x) for linear in self.int4[:2]])
            time_all("int4", [fused(linear, x, config) for linear in self.int4[:2]], config)
            return timings
        time_all("int4 chosen", [partial(linear.forward, x) for linear in self.int4])
        grid = [
            time_all("int4", [fused(linear, x, config) for linear in self.int4], config)
            for config in candidates(tokens, self.int4[0].layout)
        ]
        if tokens > EARLY_TOKENS:
            return timings
        best = min(grid, key=lambda t: t.us).config
        assert best is not None
        early = replace(best, is_dependent=True)
        time_all("int4 early", [fused(linear, x, early) for linear in self.int4], early)
        return timings


def num_bytes(shape: str, tokens: int) -> float:
    out, inputs = SHAPES[shape]
    return out * inputs * (0.5 + 2 / 128) + 2 * tokens * (out + inputs)


def describe(timing: Timing) -> str:
    c = timing.config
    assert c is not None
    return f"{c.block_m}x{c.block_out}/{c.split} w{c.num_warps} s{c.num_stages} {timing.us:.1f}"


KINDS = ("cublas", "fp8", "int4 chosen", "int4", "int4 early")


def show(timings: list[Timing], tokens_list: tuple[int, ...]) -> None:
    """A line per shape and number of tokens in microseconds, then whole models in milliseconds."""
    print("shape        M  " + " ".join(f"{kind:>11}" for kind in KINDS) + "  ratio  % bw  three best")
    sums = []
    for tokens in tokens_list:
        total = dict.fromkeys(KINDS, 0.0)
        for shape in SHAPES:
            here = [t for t in timings if (t.shape, t.tokens) == (shape, tokens)]
            us = {kind: min((t.us for t in here if t.kind == kind), default=float("nan")) for kind in KINDS}
            total = {kind: total[kind] + us[kind] for kind in KINDS}
            share = 100 * num_bytes(shape, tokens) / us["int4"] / (READ_GBS * 1e3)
            best = sorted((t for t in here if t.kind == "int4"), key=lambda t: t.us)[:3]
            columns = " ".join(f"{us[kind]:11.1f}" for kind in KINDS)
            ratio = us["cublas"] / us["int4"]
            configs = " | ".join(map(describe, best))
            print(f"{shape:8} {tokens:5}  {columns} {ratio:6.2f} {share:5.0f}  {configs}")
        sums.append((tokens, total))
    print(f"\nlinears of {LAYERS} layers, ms; cuBLAS over int4 as chosen and at best; bar")
    for tokens, total in sums:
        columns = " ".join(f"{LAYERS * total[kind] / 1000:11.3f}" for kind in KINDS)
        ratios = f"{total['cublas'] / total['int4 chosen']:6.2f} {total['cublas'] / total['int4']:6.2f}"
        print(f"         {tokens:5}  {columns} {ratios}  {BARS.get(tokens, '')}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer numbers of tokens and repeats")
    parser.add_argument("--out", help="write all times there as JSON")
    options = parser.parse_args()
    torch.manual_seed(int(time.time()))
    start = time.perf_counter()
    compile_all()
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    comparison = Comparison()
    for case in CASES:
        check_int4(comparison, case)
    check_fp8(comparison)
    seconds = time.perf_counter() - start
    print(f"{comparison.compared} products held to float64 in {seconds:.0f} s, {len(comparison.wrong)} wrong")
    if comparison.wrong:
        sys.exit("\n".join(comparison.wrong[:40]))
    tokens_list = (1, 16, 32, 64, 128, 2048) if options.quick else TOKENS + PREFILL_TOKENS
    timings = []
    for name in SHAPES:
        shape = Shape(name)
        for tokens in tokens_list:
            timings += shape.measure(tokens, 5 if options.quick else 10)
        del shape
        torch.cuda.empty_cache()
    show(timings, tokens_list)
    result = {
        "device": torch.cuda.get_device_name(),
        "compared": comparison.compared,
        "timings": [asdict(t) for t in timings],
    }
    if options.out:
        Path(options.out).write_text(json.dumps(result))
    fastest = {f"{t.shape}/{t.tokens}/{t.kind}": round(t.us, 2) for t in sorted(timings, key=lambda t: -t.us)}
    print(f"{time.perf_counter() - start:.0f} s")
    print(json.dumps({"device": result["device"], "us": fastest}))


if __name__ == "__main__":
    main()
