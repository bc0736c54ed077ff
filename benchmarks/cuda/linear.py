"""Low-precision linear layers at the four fused shapes of Llama-3.1-8B, against cuBLAS in bfloat16.

    python -m benchmarks.cuda.linear [--quick] [--out linear.json]

Claim: with 4-bit weights a layer's linears take at most 1/3.3 of cuBLAS's time at 1 to 16 tokens, 1/3 at 32,
1/2 at 64 and 1/1.3 at 128, and 1.15 of it in prefill from 2048 on. First every kernel is held to a float64
product (fresh random inputs, outputs full of NaN); nothing is timed unless all agree.

Two measures, both replays of CUDA graphs over more weights than the cache holds, the variants taking turns,
medians. "layers": the four linears one after the other in LAYERS_TIMED layers, as a model runs them; the bars
are held to this. "shapes": one shape again and again, for each of a grid of configurations; the best of each
class is printed as `cuda_config` writes it. The bandwidth is weights, scales, inputs and outputs once each
over the time, in percent of READ_GBS, measured on such a card.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from polybatch.kernels.linear.cuda import FUSED_TOKENS, Fp8Linear, Int4Linear, LinearWorkspace, pack
from polybatch.kernels.linear.cuda_config import Int4Config, int4_config
from polybatch.kernels.linear.cuda_pack import Int4Layout, pack_int4
from polybatch.kernels.linear.quantize_symmetric import (
    QuantizedTensor,
    dequantize_symmetric,
    quantize_fp8,
    quantize_int4_symmetric,
)
from polybatch.kernels.rehearsal import rehearsal

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)
PREFILL_TOKENS = (1024, 2048, 8192)
BARS = {1: 3.3, 8: 3.3, 16: 3.3, 32: 3.0, 64: 2.0, 128: 1.3, 2048: 1 / 1.15, 8192: 1 / 1.15}
READ_GBS = 3090.0
LAYERS = 32
LAYERS_TIMED = 4
CHECKED_TOKENS = (1, 3, 16, 17, 33, 64, 100, 128, 200, 512, 700)
COLD_BYTES = 200 << 20
Run = Callable[[torch.Tensor], object]
# Tile of tokens -> tiles of rows, warps, stages, whether scaled. With 8 tokens or 2 warps each warp
# multiplies by itself (mma.sync), with no wait for the other three; 8 tokens also halve what is copied of x.
TILES: dict[int, tuple[tuple[int, int, int, bool], ...]] = {
    8: ((64, 4, 3, False), (64, 4, 4, False), (32, 2, 3, False), (64, 2, 3, False)),
    16: ((64, 4, 3, False), (32, 2, 3, False), (64, 2, 3, False)),
    32: ((64, 4, 3, False), (64, 4, 4, False), (128, 8, 3, False)),
    64: ((64, 4, 3, False), (128, 8, 3, False), (128, 8, 3, True)),
    128: ((128, 8, 4, True), (256, 8, 3, True)),
}
# The same for Hopper's kernel, of rows, warps, stages.
HOPPER_TILES: dict[int, tuple[tuple[int, int, int], ...]] = {
    32: ((64, 4, 2), (64, 4, 3), (128, 4, 3), (128, 8, 3)),
    64: ((64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 4, 4), (128, 8, 2), (256, 8, 3)),
    128: ((64, 4, 3), (128, 4, 2), (128, 8, 2), (256, 8, 2), (256, 16, 2)),
}
PROGRAMS = (0, 132, 264, 396, 528, 1056)
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
    Case(6144, 4096, 128, False, torch.bfloat16, (3, 17, 33, 128, 200)),
    Case(4096, 14336, 128, False, torch.bfloat16),
    Case(520, 1096, 128, True, torch.bfloat16, (3, 33, 128)),
    Case(520, 1096, 128, False, torch.float16, (3, 33, 128, 200)),
    Case(1000, 648, None, False, torch.float16),
    Case(392, 2056, 256, True, torch.float16),
)


def candidates(tokens: int, layout: Int4Layout) -> list[Int4Config]:
    """The grid for a number of tokens, without repetitions."""
    tile = next((size for size in TILES if size >= tokens), 128)
    sizes = {8: (8, 16), 128: (64, 128)}.get(tile, (tile,))
    found: dict[Int4Config, None] = {}
    for block_m in sizes:
        for block_out, warps, stages, is_scaled in TILES[block_m]:
            if layout.rows % block_out:
                continue
            programs = layout.rows // block_out * -(-tokens // block_m)
            for wanted in PROGRAMS if tokens <= 128 else (0,):
                split = max(1, min(round(wanted / programs), layout.k_tiles // 2, 8))
                found[Int4Config(block_m, block_out, split, warps, stages, is_scaled)] = None
    if True in kernels(layout):
        for block_out, warps, stages in HOPPER_TILES.get(tile, ()):
            programs = layout.rows // block_out * -(-tokens // tile)
            for wanted in (0, 132, 264, 396) if layout.rows % block_out == 0 else ():
                split = max(1, min(wanted // programs, layout.k_tiles // 2, 8))
                found[Int4Config(tile, block_out, split, warps, stages, True, True)] = None
    return list(found)


def kernels(layout: Int4Layout) -> tuple[bool, ...]:
    """Values of int4_config's is_hopper that the layout can have on this GPU."""
    is_known = layout.is_grouped and layout.offsets is None and torch.cuda.get_device_capability() == (9, 0)
    return (False, True) if is_known else (False,)


def random_layout(out: int, inputs: int) -> Int4Layout:
    """Packed weights nobody rounded: for times, where the values only must not be special."""
    words = torch.randint(-(2**15), 2**15, (inputs // 256, out, 64), dtype=torch.int16, device="cuda")
    scales = torch.rand(inputs // 256 + 1, out, 2, device="cuda") * 0.01 + 0.001
    packed = scales.half().view(torch.int32).squeeze(2)
    return Int4Layout(out, inputs, words, packed, None, True, False)


def time_in_turns(calls: list[list[Callable[[], object]]], repeats: int) -> list[float]:
    """Median microseconds of each list of calls, captured in a graph of its own; the graphs take turns."""
    graphs = []
    for one in calls:
        for call in one[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in one:
                call()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(repeats + 1):
        for graph, mine in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            mine.append(1000 * start.elapsed_time(end))
    return [statistics.median(mine[1:]) for mine in times]


class Comparison:
    """Counts products held to a float64 one, and keeps those that disagree."""

    def __init__(self) -> None:
        self.compared = 0
        self.wrong: list[str] = []

    def hold(self, name: str, run: Run, expected: torch.Tensor, dtype: torch.dtype, limit: float) -> None:
        """Run twice into a view of a wider buffer full of NaN."""
        tokens, out = expected.shape
        wide, again = (
            torch.full((tokens, out + 32), torch.nan, dtype=dtype, device="cuda") for _ in range(2)
        )
        run(wide[:, 16:-16])
        run(again[:, 16:-16])
        error = float((wide[:, 16:-16].double() - expected).norm() / expected.norm())
        untouched = bool(wide[:, :16].isnan().all() and wide[:, -16:].isnan().all())
        self.compared += 1
        is_same = torch.equal(wide[:, 16:-16], again[:, 16:-16])
        if not error < limit or not untouched or not is_same:
            self.wrong.append(
                f"{name}: error {error:.2e}, outside untouched: {untouched}, same again: {is_same}"
            )


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
        for config in configs_to_check(tokens, layout, case):
            comparison.hold(f"{label} {config}", fused(linear, x, config), expected, case.dtype, limit)


def configs_to_check(tokens: int, layout: Int4Layout, case: Case) -> list[Int4Config]:
    """Besides what `forward` takes: the grid."""
    if tokens > FUSED_TOKENS:
        return [int4_config(tokens, layout.rows, layout.k_tiles, kernel) for kernel in kernels(layout)]
    return candidates(tokens, layout) if tokens in case.all_configs else []


def compile_all() -> None:
    """Compile what will be checked and timed, on all processors at once."""
    with rehearsal(os.cpu_count() or 1):
        for case in CASES:
            weight = quantize_int4_symmetric(torch.randn(case.out, case.inputs, device="cuda"), case.group)
            zeros = torch.zeros_like(weight.scales, dtype=torch.uint8) if case.zeros else None
            scales = weight.scales.half() if case.zeros else weight.scales
            layout = pack_int4(QuantizedTensor("int4", weight.values, scales, zeros, weight.group_size))
            linear = Int4Linear(layout, LinearWorkspace("cuda", case.dtype, 4096))
            x = torch.empty(1024, case.inputs, device="cuda", dtype=case.dtype)
            out = torch.empty(1024, case.out + 32, device="cuda", dtype=case.dtype)[:, 16:-16]
            for tokens in CHECKED_TOKENS:
                chosen = [
                    int4_config(tokens, layout.rows, layout.k_tiles, kernel) for kernel in kernels(layout)
                ]
                for config in [*chosen, *configs_to_check(tokens, layout, case)]:
                    linear.forward_fused(x[:tokens], out[:tokens], config)
        workspace = LinearWorkspace("cuda", torch.bfloat16, 1024)
        for num_out, inputs in SHAPES.values():
            linear = Int4Linear(random_layout(num_out, inputs), workspace)
            x = torch.empty(256, inputs, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(256, num_out, device="cuda", dtype=torch.bfloat16)
            for tokens in (1, 16, 32, 64, 128, 256):
                for config in candidates(tokens, linear.layout):
                    linear.forward_fused(x[:tokens], out[:tokens], config)


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

    def __init__(self, name: str, workspace: LinearWorkspace) -> None:
        out, inputs = SHAPES[name]
        self.name = name
        copies = max(LAYERS_TIMED, -(-COLD_BYTES // (out * inputs // 2)))
        self.int4 = [Int4Linear(random_layout(out, inputs), workspace) for _ in range(copies)]
        few = max(LAYERS_TIMED, -(-COLD_BYTES // (out * inputs)))
        weights = [torch.randn(out, inputs, device="cuda").bfloat16() * 0.02 for _ in range(few)]
        self.plain = [pack(w, None, workspace) for w in weights]
        self.fp8 = [pack(w, "fp8", workspace) for w in weights]

    def inputs(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x as the engine has it, the first rows of a larger buffer."""
        out, inputs = SHAPES[self.name]
        x = torch.randn(-(-tokens // 128) * 128, inputs, device="cuda").bfloat16()[:tokens]
        return x, torch.empty(tokens, out, device="cuda", dtype=torch.bfloat16)

    def measure(self, tokens: int, repeats: int) -> list[Timing]:
        """Every kind and configuration."""
        layout = self.int4[0].layout
        configs = candidates(tokens, layout)
        kinds: dict[tuple[str, Int4Config | None], list[Run]] = {}
        x, y = self.inputs(tokens)
        few = slice(None) if tokens <= FUSED_TOKENS else slice(2)
        kinds["cublas", None] = [partial(linear.forward, x) for linear in self.plain[few]]
        kinds["fp8", None] = [partial(linear.forward, x) for linear in self.fp8[few]]
        kinds["chosen", None] = [partial(linear.forward, x) for linear in self.int4[few]]
        for config in configs:
            kinds["int4", config] = [fused(linear, x, config) for linear in self.int4[few]]
        times = time_in_turns([[partial(run, y) for run in runs] for runs in kinds.values()], repeats)
        return [
            Timing(self.name, tokens, kind, us / len(runs), config)
            for ((kind, config), runs), us in zip(kinds.items(), times, strict=True)
        ]


def measure_layers(shapes: list[Shape], tokens: int, timings: list[Timing], repeats: int) -> list[Timing]:
    """The linears of whole layers in turn; "best": with the configurations that were fastest alone.

    "triton": as on other GPUs than Hopper's.
    """
    kinds = ("cublas", "fp8", "triton", "chosen", "best")
    calls: dict[str, list[Callable[[], object]]] = {kind: [] for kind in kinds}
    buffers = [shape.inputs(tokens) for shape in shapes]
    for layer in range(LAYERS_TIMED):
        for shape, (x, y) in zip(shapes, buffers, strict=True):
            layout = shape.int4[layer].layout
            by_kernel = [int4_config(tokens, layout.rows, layout.k_tiles, k) for k in kernels(layout)]
            alone = [t for t in timings if (t.shape, t.tokens, t.kind) == (shape.name, tokens, "int4")]
            best = min(alone, key=lambda t: t.us).config or by_kernel[-1]
            calls["cublas"].append(partial(shape.plain[layer].forward, x, y))
            calls["fp8"].append(partial(shape.fp8[layer].forward, x, y))
            calls["triton"].append(partial(fused(shape.int4[layer], x, by_kernel[0]), y))
            calls["chosen"].append(partial(shape.int4[layer].forward, x, y))
            calls["best"].append(partial(fused(shape.int4[layer], x, best), y))
    times = time_in_turns(list(calls.values()), repeats)
    return [Timing("layers", tokens, k, us / LAYERS_TIMED) for k, us in zip(calls, times, strict=True)]


def num_bytes(shape: str, tokens: int) -> float:
    out, inputs = SHAPES[shape]
    return out * inputs * (0.5 + 2 / 128) + 2 * tokens * (out + inputs)


def describe(timing: Timing) -> str:
    c = timing.config
    assert c is not None
    tile = f"{c.block_m}x{c.block_out}/{c.split} w{c.num_warps} s{c.num_stages}"
    return f"{tile}{' hopper' if c.is_hopper else ' scaled' if c.is_scaled else ''} {timing.us:.1f}"


def as_source(config: Int4Config) -> str:
    name = "_hopper" if config.is_hopper else "Int4Config"
    tail = ", is_scaled=True" if config.is_scaled and not config.is_hopper else ""
    numbers = (config.block_m, config.block_out, config.split, config.num_warps, config.num_stages)
    return f"{name}({', '.join(map(str, numbers))}{tail})"


def show_shapes(timings: list[Timing], tokens_list: tuple[int, ...]) -> None:
    """A line per shape and number of tokens, microseconds."""
    print("\nshapes       M    cublas      fp8   chosen     best  ratio % bw  four best")
    for tokens in tokens_list:
        for shape in SHAPES:
            here = [t for t in timings if (t.shape, t.tokens) == (shape, tokens)]
            us = [min(t.us for t in here if t.kind == kind) for kind in ("cublas", "fp8", "chosen", "int4")]
            share = 100 * num_bytes(shape, tokens) / us[3] / (READ_GBS * 1e3)
            configs = " | ".join(
                map(describe, sorted((t for t in here if t.kind == "int4"), key=lambda t: t.us)[:4])
            )
            columns = " ".join(f"{u:8.1f}" for u in us)
            print(f"{shape:8} {tokens:5}  {columns} {us[0] / us[3]:6.2f} {share:4.0f}  {configs}")
    print("\nfastest alone, as cuda_config writes them")
    for tokens in (t for t in tokens_list if t <= FUSED_TOKENS):
        for shape in SHAPES:
            alone = [t for t in timings if (t.shape, t.tokens, t.kind) == (shape, tokens, "int4")]
            config = min(alone, key=lambda t: t.us).config
            assert config is not None
            print(f"  {tokens:4} _{shape.upper()}: {as_source(config)},")


def show_layers(timings: list[Timing], tokens_list: tuple[int, ...]) -> None:
    """Whole models in milliseconds."""
    floor = sum(num_bytes(shape, 1) for shape in SHAPES) / (READ_GBS * 1e3) * LAYERS / 1000
    print(f"\nlayers: linears of {LAYERS}, ms; weights alone {floor:.2f}")
    print("             M   cublas      fp8   triton   chosen     best  cublas/chosen cublas/best  bar")
    for tokens in tokens_list:
        us = {t.kind: t.us for t in timings if (t.shape, t.tokens) == ("layers", tokens)}
        columns = " ".join(f"{LAYERS * value / 1000:8.3f}" for value in us.values())
        chosen, best = us["cublas"] / us["chosen"], us["cublas"] / us["best"]
        bar = BARS.get(tokens)
        verdict = "" if bar is None else f"{bar:.2f} {'met' if chosen >= bar else 'MISSED'}"
        print(f"         {tokens:5} {columns} {chosen:14.2f} {best:11.2f}  {verdict}")


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
    tokens_list = (1, 16, 32, 64, 128, 256, 512, 1024, 2048) if options.quick else TOKENS + PREFILL_TOKENS
    repeats = 9 if options.quick else 15
    workspace = LinearWorkspace("cuda", torch.bfloat16, max(PREFILL_TOKENS))
    shapes = [Shape(name, workspace) for name in SHAPES]
    timings: list[Timing] = []
    for tokens in tokens_list:
        for shape in shapes:
            timings += shape.measure(tokens, repeats)
        timings += measure_layers(shapes, tokens, timings, repeats)
    show_shapes(timings, tokens_list)
    show_layers(timings, tokens_list)
    result = {
        "device": torch.cuda.get_device_name(),
        "compared": comparison.compared,
        "timings": [asdict(t) for t in timings],
    }
    if options.out:
        Path(options.out).write_text(json.dumps(result))
    print(f"{time.perf_counter() - start:.0f} s")
    layers = {f"{t.tokens}/{t.kind}": round(t.us, 1) for t in timings if t.shape == "layers"}
    print(json.dumps({"device": result["device"], "us_per_layer": layers}))


if __name__ == "__main__":
    main()
