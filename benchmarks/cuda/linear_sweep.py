"""Candidates for 4-bit products of up to 64 tokens: `python -m benchmarks.cuda.linear_sweep`.

For each number of tokens and each of the four linears, every candidate is held to a float64 product and timed
beside today's configuration: one CUDA graph over LAYERS layers of distinct weights, graphs taking turns,
medians. Then whole layers: today's and the fastest configurations against cuBLAS. The table of the fastest is
printed as `cuda_config` writes it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from triton.errors import TritonError

from benchmarks.cuda.linear import (
    BARS,
    SHAPES,
    Comparison,
    as_source,
    num_bytes,
    random_layout,
    time_in_turns,
)
from polybatch.kernels.linear.cuda import Int4Linear, LinearWorkspace
from polybatch.kernels.linear.cuda_config import Int4Config, int4_config
from polybatch.kernels.linear.cuda_pack import Int4Layout, pack_int4
from polybatch.kernels.linear.quantize_symmetric import QuantizedTensor, dequantize_symmetric

Cells = dict[tuple[int, str], list[Int4Config]]
Job = tuple[Int4Config, int, str | int]
LAYERS = 32
REPEATS = 7
READ_US_PER_BYTE = 1 / 3.09e6
# Ways other than the four linears' that the new kernels must also know: group, zeros, dtype.
VARIANTS = ((128, True, torch.bfloat16), (256, True, torch.float16), (None, False, torch.float16))
VARIANT_SHAPE = (640, 2312)
VARIANT_CONFIGS = (
    Int4Config(8, 32, 1, 4, 4, slices=1),
    Int4Config(16, 16, 1, 8, 3, slices=5),
    Int4Config(16, 64, 1, 4, 3, programs=7),
    Int4Config(64, 128, 1, 8, 3, programs=33),
)


def rows(block_m: int, block_rows: int, warps: int, stages: int, slices: int = 1) -> Int4Config:
    return Int4Config(block_m, block_rows, 1, warps, stages, slices=slices)


def tiles(
    block_m: int,
    block_out: int,
    split: int,
    warps: int,
    stages: int,
    scaled: bool = False,
    registers: int = 0,
) -> Int4Config:
    return Int4Config(block_m, block_out, split, warps, stages, scaled, max_registers=registers)


def stream(
    block_m: int, block_out: int, warps: int, stages: int, programs: int, registers: int = 0
) -> Int4Config:
    return Int4Config(block_m, block_out, 1, warps, stages, programs=programs, max_registers=registers)


_FEWEST = {
    "qkv": [
        rows(8, 16, 4, 4), rows(8, 16, 4, 3), rows(8, 32, 4, 4), rows(8, 32, 8, 4), rows(8, 16, 8, 4, 3),
        rows(8, 16, 8, 5, 3), tiles(16, 128, 4, 8, 4), tiles(16, 64, 4, 4, 4), stream(16, 64, 4, 4, 264),
    ],
    "o": [
        rows(8, 32, 4, 5), rows(8, 32, 4, 4), rows(8, 32, 8, 4), rows(8, 32, 8, 5), rows(8, 16, 4, 4),
        rows(8, 16, 4, 5), rows(8, 16, 8, 4), tiles(16, 128, 4, 8, 4), stream(16, 64, 4, 4, 264),
    ],
    "gate_up": [
        rows(8, 32, 4, 4, 7), rows(8, 32, 4, 6, 7), rows(8, 32, 8, 4, 7), rows(8, 32, 8, 6, 7),
        rows(8, 16, 4, 4, 7), rows(8, 16, 4, 5, 7), rows(8, 64, 8, 4, 4), rows(8, 32, 4, 4, 4),
        tiles(16, 128, 1, 8, 4), tiles(16, 256, 1, 8, 4), tiles(16, 64, 1, 4, 4), tiles(16, 128, 1, 4, 4),
        stream(16, 64, 4, 4, 264), stream(16, 64, 4, 5, 264), stream(16, 64, 4, 4, 396),
        stream(16, 128, 8, 4, 264),
    ],
    "down": [
        rows(8, 32, 4, 5), rows(8, 32, 4, 6), rows(8, 32, 8, 4), rows(8, 32, 8, 6), rows(8, 16, 4, 4),
        rows(8, 16, 4, 5), rows(8, 16, 8, 4), tiles(16, 128, 4, 8, 4), stream(16, 64, 4, 4, 264),
        stream(16, 64, 4, 5, 264), stream(16, 128, 8, 5, 132),
    ],
}  # fmt: skip
CANDIDATES: dict[int, dict[str, list[Int4Config]]] = {
    1: _FEWEST,
    8: _FEWEST,
    16: {
        "qkv": [
            rows(16, 32, 4, 3), rows(16, 32, 8, 3), rows(16, 16, 4, 3), tiles(16, 128, 4, 8, 4),
            tiles(16, 128, 3, 8, 4), tiles(16, 64, 4, 4, 4), stream(16, 64, 4, 4, 264),
            stream(16, 64, 4, 4, 396),
        ],
        "o": [
            rows(16, 32, 4, 4), rows(16, 32, 8, 4), rows(16, 32, 8, 5), rows(16, 16, 4, 3),
            tiles(16, 128, 4, 8, 4), tiles(16, 128, 8, 8, 4), stream(16, 64, 4, 4, 264),
        ],
        "gate_up": [
            rows(16, 64, 8, 3, 4), rows(16, 64, 8, 4, 4), rows(16, 32, 8, 4, 7), rows(16, 32, 4, 4, 7),
            tiles(16, 128, 1, 8, 4), tiles(16, 256, 1, 8, 4), tiles(16, 128, 1, 4, 4), tiles(16, 64, 1, 4, 4),
            stream(16, 64, 4, 4, 264), stream(16, 64, 4, 5, 264), stream(16, 64, 4, 4, 396),
            stream(16, 128, 8, 4, 264), stream(16, 128, 8, 5, 132), stream(16, 256, 8, 4, 132),
        ],
        "down": [
            rows(16, 32, 4, 4), rows(16, 32, 8, 4), rows(16, 64, 8, 4), tiles(16, 128, 4, 8, 4),
            tiles(16, 128, 8, 8, 4), tiles(16, 256, 8, 8, 4), tiles(16, 64, 8, 4, 4),
            stream(16, 64, 4, 4, 264), stream(16, 64, 4, 4, 396), stream(16, 128, 8, 5, 132),
        ],
    },
    32: {
        "qkv": [
            tiles(32, 128, 3, 8, 4), tiles(32, 128, 4, 8, 4), tiles(32, 128, 5, 8, 4), tiles(32, 64, 4, 4, 4),
            stream(32, 64, 4, 4, 264), stream(32, 64, 4, 3, 396, 168), stream(32, 128, 8, 4, 132),
            stream(32, 128, 8, 4, 264, 128),
        ],
        "o": [
            tiles(32, 128, 4, 8, 4), tiles(32, 128, 6, 8, 4), tiles(32, 128, 8, 8, 4),
            tiles(32, 128, 4, 8, 5),
            stream(32, 64, 4, 4, 264), stream(32, 64, 4, 3, 396, 168), stream(32, 128, 8, 5, 132),
        ],
        "gate_up": [
            tiles(32, 128, 1, 8, 4), tiles(32, 256, 1, 8, 4), tiles(32, 256, 1, 8, 4, True),
            tiles(32, 128, 1, 4, 4), stream(32, 128, 8, 4, 264, 128), stream(32, 128, 8, 3, 264, 128),
            stream(32, 128, 8, 5, 132), stream(32, 64, 4, 4, 264), stream(32, 64, 4, 3, 396, 168),
            stream(32, 256, 8, 4, 132),
        ],
        "down": [
            tiles(32, 128, 4, 8, 4), tiles(32, 128, 8, 8, 4), tiles(32, 256, 8, 8, 4),
            stream(32, 128, 8, 4, 264, 128), stream(32, 128, 8, 5, 132), stream(32, 64, 4, 4, 264),
            stream(32, 64, 4, 3, 396, 168), stream(32, 256, 8, 4, 132),
        ],
    },
    64: {
        "qkv": [
            tiles(64, 64, 2, 4, 3), tiles(64, 64, 1, 4, 2), tiles(64, 64, 4, 4, 2, False, 168),
            tiles(64, 128, 2, 8, 4), tiles(64, 128, 3, 8, 4), stream(64, 64, 4, 3, 264),
            stream(64, 64, 4, 4, 132), stream(64, 128, 8, 4, 132),
        ],
        "o": [
            tiles(64, 64, 4, 4, 3), tiles(64, 64, 4, 4, 2, False, 168), tiles(64, 128, 4, 8, 4),
            stream(64, 64, 4, 3, 264), stream(64, 128, 8, 4, 132),
        ],
        "gate_up": [
            tiles(64, 64, 1, 4, 2, False, 168), tiles(64, 128, 1, 8, 4), tiles(64, 128, 1, 8, 2, False, 128),
            tiles(64, 128, 1, 8, 4, True), tiles(64, 256, 1, 8, 3, True), tiles(64, 256, 1, 8, 4, True),
            stream(64, 64, 4, 3, 264), stream(64, 64, 4, 2, 396, 168), stream(64, 64, 4, 4, 132),
            stream(64, 128, 8, 3, 132), stream(64, 128, 8, 4, 132),
        ],
        "down": [
            tiles(64, 64, 6, 4, 2, False, 168), tiles(64, 128, 4, 8, 4), tiles(64, 256, 8, 8, 4, True),
            stream(64, 64, 4, 3, 264), stream(64, 64, 4, 2, 396, 168), stream(64, 128, 8, 3, 132),
            stream(64, 128, 8, 4, 132),
        ],
    },
}  # fmt: skip


def candidates() -> Cells:
    """By number of tokens and shape, today's configuration first."""
    found: Cells = {}
    for tokens, (shape, (out, inputs)) in itertools.product(CANDIDATES, SHAPES.items()):
        today = int4_config(tokens, out, inputs // 256)
        found[tokens, shape] = list(dict.fromkeys([today, *CANDIDATES[tokens][shape]]))
    return found


def variant_weight(group: int | None, zeros: bool) -> QuantizedTensor:
    out, inputs = VARIANT_SHAPE
    inputs -= inputs % (group or 8)
    size = group or inputs
    shape = (out, inputs // size)
    values = torch.randint(0, 16, (out, inputs), dtype=torch.uint8, device="cuda")
    table = torch.randint(0, 17, shape, dtype=torch.uint8, device="cuda") if zeros else None
    return QuantizedTensor("int4", values, (torch.rand(shape, device="cuda") + 0.5).half(), table, size)


def compile_one(job: Job) -> str:
    """In a process of its own: compile for a shape, or for a variant, into Triton's cache on disk."""
    config, tokens, where = job
    if isinstance(where, str):
        out, inputs = SHAPES[where]
        words = torch.empty(inputs // 256, out, 64, dtype=torch.int16, device="cuda")
        scales = torch.empty(inputs // 256 + 1, out, dtype=torch.int32, device="cuda")
        layout, dtype = Int4Layout(out, inputs, words, scales, None, True, False), torch.bfloat16
    else:
        group, zeros, dtype = VARIANTS[where]
        layout = pack_int4(variant_weight(group, zeros))
    linear = Int4Linear(layout, LinearWorkspace("cuda", dtype, 64))
    x = torch.empty(tokens, layout.num_in, device="cuda", dtype=dtype)
    wide = torch.empty(tokens, layout.num_out + 32, device="cuda", dtype=dtype)
    out_dense = torch.empty(tokens, layout.num_out, device="cuda", dtype=dtype)
    try:
        for y in (wide[:, 16:-16], out_dense):
            linear.compile_fused(x, y, config)
    except (RuntimeError, TritonError) as error:
        return f"{describe(config)} for {where}: {error}"
    return ""


def compile_all(pool: ProcessPoolExecutor, wanted: Cells, variants: bool) -> dict[Int4Config, str]:
    """What could not be compiled, and why. Numbers of tokens share kernels, and so do many shapes."""
    jobs: dict[tuple[Int4Config, int | str], Job] = {}
    for (tokens, shape), configs in wanted.items():
        for config in configs:
            depends = SHAPES[shape][1] if config.slices or config.programs else ""
            jobs.setdefault((config, depends), (config, tokens, shape))
    everything = list(jobs.values())
    if variants:
        everything += [(config, 17, i) for config in VARIANT_CONFIGS for i in range(len(VARIANTS))]
    start = time.perf_counter()
    results = list(pool.map(compile_one, everything))
    print(f"compiled {len(everything)} kernels in {time.perf_counter() - start:.0f} s", flush=True)
    return {job[0]: result for job, result in zip(everything, results, strict=True) if result}


def check_variants(comparison: Comparison) -> None:
    for group, zeros, dtype in VARIANTS:
        weight = variant_weight(group, zeros)
        exact = dequantize_symmetric(weight).double().T
        linear = Int4Linear(pack_int4(weight), LinearWorkspace("cuda", dtype, 64))
        for tokens, config in itertools.product((3, 17), VARIANT_CONFIGS):
            linear.reserve([(tokens, config)])
            x = torch.randn(tokens, weight.shape[1], device="cuda").to(dtype)
            run = partial(linear.forward_fused, x, config=config)
            name = f"{describe(config)} M {tokens} group {group} zeros {zeros} {dtype}"
            limit = 6e-3 if dtype == torch.bfloat16 else 1e-3
            for _ in range(2):
                comparison.hold(name, run, x.double() @ exact, dtype, limit)


def describe(config: Int4Config) -> str:
    tile = f"{config.block_m}x{config.block_out} w{config.num_warps} s{config.num_stages}"
    tail = (" scaled" if config.is_scaled else "") + (" short" if config.is_short else "")
    tail += f" r{config.max_registers}" if config.max_registers else ""
    if config.slices:
        return f"rows {tile} x{config.slices}{tail}"
    if config.programs:
        return f"stream {tile} p{config.programs}{tail}"
    return f"tiles {tile} /{config.split}{tail}"


class Product:
    """One linear in LAYERS layers, and its weight in the first as float64."""

    def __init__(self, shape: str, workspace: LinearWorkspace) -> None:
        out, inputs = SHAPES[shape]
        self.shape = shape
        self.workspace = workspace
        values = torch.randint(0, 16, (out, inputs), dtype=torch.uint8, device="cuda")
        scales = (torch.rand(out, inputs // 128, device="cuda") * 0.01 + 0.001).half()
        weight = QuantizedTensor("int4", values, scales, None, 128)
        self.exact = dequantize_symmetric(weight).double().T
        layouts = [pack_int4(weight), *(random_layout(out, inputs) for _ in range(LAYERS - 1))]
        self.linears = [Int4Linear(layout, workspace) for layout in layouts]

    def buffers(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, inputs = SHAPES[self.shape]
        x = torch.randn(tokens, inputs, device="cuda").bfloat16()
        return x, torch.empty(tokens, out, device="cuda", dtype=torch.bfloat16)

    def sweep(
        self, tokens: int, configs: list[Int4Config], refused: dict[Int4Config, str]
    ) -> list[tuple[Int4Config, float]]:
        """Microseconds of every configuration that gives the right product."""
        x, y = self.buffers(tokens)
        expected = x.double() @ self.exact
        right: list[Int4Config] = []
        for config in configs:
            if config in refused:
                continue
            comparison = Comparison()
            run = partial(self.linears[0].forward_fused, x, config=config)
            try:
                for _ in range(3):  # Counters must be zero again after a launch.
                    comparison.hold(describe(config), run, expected, torch.bfloat16, 6e-3)
            except TritonError as error:
                comparison.wrong.append(f"{describe(config)}: {error}")
            if comparison.wrong:
                self.workspace.buffer("arrived").zero_()
                refused[config] = f"M {tokens} {self.shape} {comparison.wrong[0]}"
            else:
                right.append(config)
        calls: list[list[Callable[[], object]]] = [
            [partial(one.forward_fused, x, y, config) for one in self.linears] for config in right
        ]
        times = time_in_turns(calls, REPEATS)
        return [(config, us / LAYERS) for config, us in zip(right, times, strict=True)]


def sweep_int4(out_path: str | None, processes: int) -> None:
    start = time.perf_counter()
    wanted = candidates()
    found: dict[tuple[int, str], list[tuple[Int4Config, float]]] = {}
    final: dict[tuple[int, str], list[tuple[Int4Config, float]]] = {}
    comparison = Comparison()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        refused = compile_all(pool, wanted, variants=True)
        check_variants(comparison)
        workspace = LinearWorkspace("cuda", torch.bfloat16, 64)
        products = {shape: Product(shape, workspace) for shape in SHAPES}
        # One buffer that fits all, so that no graph keeps a smaller one.
        for (tokens, shape), configs in wanted.items():
            products[shape].linears[0].reserve([(tokens, config) for config in configs])
        print(f"ready after {time.perf_counter() - start:.0f} s", flush=True)
        for (tokens, shape), configs in wanted.items():
            found[tokens, shape] = products[shape].sweep(tokens, configs, refused)
        # The three fastest of each also with the shorter unpacking, beside today's once more.
        again: Cells = {}
        for cell, timed in found.items():
            fastest = [c for c, _ in sorted(timed, key=lambda t: t[1]) if not c.is_scaled][:3]
            again[cell] = [timed[0][0], fastest[0], *(replace(c, is_short=True) for c in fastest)]
        refused |= compile_all(pool, again, variants=False)
    for (tokens, shape), timed in found.items():
        second = products[shape].sweep(tokens, list(dict.fromkeys(again[tokens, shape])), refused)
        floor = num_bytes(shape, tokens) * READ_US_PER_BYTE
        ranked = " | ".join(f"{describe(c)} {us:.2f}" for c, us in sorted(timed, key=lambda t: t[1])[:6])
        print(f"{tokens:3} {shape:8} bytes {floor:5.2f}  today {timed[0][1]:6.2f}  {ranked}", flush=True)
        print(" " * 20, "again", " | ".join(f"{describe(c)} {us:.2f}" for c, us in second), flush=True)
        final[tokens, shape] = second
    for product in products.values():
        del product.exact
    weights = [
        [torch.randn(s, device="cuda").bfloat16() * 0.02 for s in SHAPES.values()] for _ in range(LAYERS)
    ]
    print("\nwhole layers, us         cublas   today    best  cublas/today cublas/best  bar")
    layers: dict[int, list[float]] = {}
    for tokens in CANDIDATES:
        calls: list[list[Callable[[], object]]] = [[], [], []]
        buffers = [product.buffers(tokens) for product in products.values()]
        for layer in range(LAYERS):
            for i, (product, (x, y)) in enumerate(zip(products.values(), buffers, strict=True)):
                best = min(final[tokens, product.shape], key=lambda t: t[1])[0]
                calls[0].append(partial(torch.mm, x, weights[layer][i].T, out=y))
                calls[1].append(partial(product.linears[layer].forward, x, y))
                calls[2].append(partial(product.linears[layer].forward_fused, x, y, best))
        us = [t / LAYERS for t in time_in_turns(calls, 2 * REPEATS)]
        layers[tokens] = us
        ratios = f"{us[0] / us[1]:12.2f} {us[0] / us[2]:11.2f}  {BARS[tokens]:.2f}"
        print(f"  {tokens:3}                 {us[0]:8.1f}{us[1]:8.1f}{us[2]:8.1f} {ratios}", flush=True)
    print("\nfastest, as cuda_config writes them")
    for (tokens, shape), timed in final.items():
        print(f"  {tokens:4} _{shape.upper()}: {as_source(min(timed, key=lambda t: t[1])[0])},")
    complaints = [*comparison.wrong, *refused.values()]
    print(f"{len(complaints)} refused or wrong", *complaints[:20], sep="\n")
    if out_path:
        rows_out = [
            [t, s, describe(c), us]
            for one in (found, final)
            for (t, s), timed in one.items()
            for c, us in timed
        ]
        device = torch.cuda.get_device_name()
        Path(out_path).write_text(json.dumps({"device": device, "products": rows_out, "layers": layers}))
    print(f"{time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write all times there as JSON")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    options = parser.parse_args()
    torch.manual_seed(int(time.time()))
    sweep_int4(options.out, options.processes)


if __name__ == "__main__":
    main()
