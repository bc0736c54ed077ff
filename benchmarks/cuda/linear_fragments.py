"""4-bit linears over weights in fragment order: which configuration is fastest, held to cuBLAS in bfloat16.

    python -m benchmarks.cuda.linear_fragments [--quick] [--out fragments.json]

First every configuration is held to a float64 product (fresh random inputs, outputs full of NaN); what
disagrees is named and not timed. Then, in CUDA graphs of consecutive products over more weights than the
cache holds, the variants taking turns, medians of microseconds per product:

    shapes   one shape again and again in every configuration; `read` only reads the words.
    layers   the four linears of LAYERS_TIMED layers one after the other. `planes` is the kernel of
             `cuda_int4`; the others are the best tiles, `plain`: ordinary launches; `early`: started early;
             `sent`: each product sends for weights of the next; `model`: but qkv does not, since attention
             comes between; `both`: sent and early; `best`: what was fastest for each shape alone.

The end is a table to be pasted into `cuda_fragment_config`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks.cuda.linear import (
    BARS,
    COLD_BYTES,
    LAYERS_TIMED,
    READ_GBS,
    SHAPES,
    Case,
    Comparison,
    Run,
    num_bytes,
    random_layout,
    time_in_turns,
)
from polybatch.kernels.linear.cuda import Int4Linear, LinearWorkspace, pack
from polybatch.kernels.linear.cuda_fragment_config import FragmentConfig, fragment_config
from polybatch.kernels.linear.cuda_fragment_linear import FUSED_TOKENS, FragmentLinear
from polybatch.kernels.linear.cuda_pack import FragmentLayout, pack_fragments
from polybatch.kernels.linear.quantize_symmetric import (
    QuantizedTensor,
    dequantize_symmetric,
    quantize_int4_symmetric,
)

# Tokens -> tiles of tokens and rows, warps, stages of x, tiles of weights under way, whether scaled.
Tile = tuple[int, int, int, int, int, bool]
TILES: dict[int, tuple[Tile, ...]] = {
    16: (
        (16, 64, 4, 4, 3, False), (16, 64, 4, 4, 3, True), (16, 64, 4, 4, 6, False), (16, 64, 4, 3, 2, False),
        (16, 128, 8, 4, 3, False), (16, 128, 8, 4, 3, True), (16, 128, 4, 4, 3, False),
    ),
    32: (
        (32, 64, 4, 4, 3, False), (32, 64, 4, 4, 3, True), (32, 128, 8, 4, 2, False),
        (32, 128, 8, 4, 3, True), (32, 128, 4, 3, 2, True), (32, 256, 8, 3, 2, True),
    ),
    64: (
        (64, 64, 4, 3, 2, False), (64, 64, 4, 3, 2, True), (64, 128, 8, 3, 2, True), (64, 128, 8, 4, 1, True),
        (64, 128, 8, 3, 2, False), (64, 256, 16, 4, 1, True), (64, 256, 8, 3, 2, True),
    ),
    128: (
        (64, 128, 8, 3, 2, True), (64, 256, 16, 4, 1, True), (64, 256, 8, 3, 2, True),
        (128, 64, 4, 2, 2, True), (128, 128, 8, 3, 2, True), (128, 128, 8, 2, 1, True),
        (128, 256, 16, 3, 1, True), (128, 256, 8, 3, 1, True),
    ),
}  # fmt: skip
PROGRAMS = (0, 132, 264, 396, 528, 660)
"""Wanted in all; the inputs are split to come near. 0: not split."""
FOLLOW_MIB = (4, 8, 16)
CHECKED_TOKENS = (1, 3, 16, 17, 33, 64, 100, 128, 200, 512, 700)
CASES = (
    Case(6144, 4096, 128, False, torch.bfloat16, (1, 16, 17, 33, 64, 100, 128)),
    Case(4096, 14336, 128, False, torch.bfloat16),
    Case(520, 1096, 128, True, torch.bfloat16, (3, 33, 64, 100)),
    Case(1000, 648, None, False, torch.float16, (3,)),
    Case(392, 2056, 256, True, torch.float16, (33,)),
)


@dataclass(frozen=True, slots=True)
class Timing:
    shape: str
    tokens: int
    kind: str
    us: float
    config: FragmentConfig | None = None


def candidates(tokens: int, layout: FragmentLayout) -> list[FragmentConfig]:
    """The grid for a number of tokens, without repetitions."""
    found: dict[FragmentConfig, None] = {}
    tiles_of = TILES[next(size for size in TILES if size >= min(tokens, 128))]
    for block_m, block_out, warps, stages, ahead, is_scaled in tiles_of:
        if layout.rows % block_out:
            continue
        tiles = layout.rows // block_out * -(-tokens // block_m)
        for wanted in PROGRAMS if tokens <= 128 else (0,):
            split = max(1, min(round(wanted / tiles), layout.k_tiles // 4, 16))
            found[FragmentConfig(block_m, block_out, split, warps, stages, ahead, is_scaled)] = None
    return list(found)


def kernel_of(config: FragmentConfig) -> FragmentConfig:
    """What was compiled, whatever the split."""
    return replace(config, split=min(config.split, 2))


def packed(case: Case) -> tuple[QuantizedTensor, FragmentLinear]:
    weight = quantize_int4_symmetric(torch.randn(case.out, case.inputs, device="cuda"), case.group)
    if case.zeros:
        table = torch.randint(0, 17, weight.scales.shape, device="cuda", dtype=torch.uint8)
        weight = QuantizedTensor("int4", weight.values, weight.scales.half(), table, weight.group_size)
    return weight, FragmentLinear(pack_fragments(weight), LinearWorkspace("cuda", case.dtype, 4096))


def configs_to_check(tokens: int, case: Case, linear: FragmentLinear) -> list[FragmentConfig]:
    if tokens not in case.all_configs:
        return []
    configs = candidates(tokens, linear.layout)
    several = [c for i, c in enumerate(configs) if kernel_of(c) not in map(kernel_of, configs[:i])]
    return [*several, replace(several[0], is_dependent=True)]


def check(comparison: Comparison, case: Case, wrong: set[FragmentConfig]) -> None:
    weight, linear = packed(case)
    exact = dequantize_symmetric(weight).double().T
    linear.following = linear
    limit = 6e-3 if case.dtype == torch.bfloat16 else 1e-3
    for tokens in CHECKED_TOKENS:
        x = torch.randn(tokens, case.inputs, device="cuda").to(case.dtype)
        expected = x.double() @ exact
        label = f"{case} M {tokens}"
        comparison.hold(label, partial(linear.forward, x), expected, case.dtype, limit)
        for config in configs_to_check(tokens, case, linear):
            before = len(comparison.wrong)
            comparison.hold(f"{label} {config}", fused(linear, x, config), expected, case.dtype, limit)
            if len(comparison.wrong) > before:
                wrong.add(kernel_of(config))


def check_chain(comparison: Comparison) -> None:
    """Layers that feed each other: started early or sent for, they compute the bits of plain launches."""
    workspace = LinearWorkspace("cuda", torch.bfloat16, 4096)
    layers = [FragmentLinear(random_fragments(4096, 4096), workspace) for _ in range(12)]
    for one, following in pairwise(layers):
        one.following = following
    for tokens in (1, 32, 64, 128):
        usual = fragment_config(tokens, 4096, 32)
        x = torch.randn(tokens, 4096, device="cuda").bfloat16()
        expected = run_chain(layers, x, replace(usual, is_dependent=False, follow_mib=0))
        for config in 5 * [replace(usual, is_dependent=True), replace(usual, is_dependent=False)]:
            comparison.compared += 1
            if not torch.equal(run_chain(layers, x, config), expected):
                comparison.wrong.append(f"chain of M {tokens}: {config} changes the result")


def run_chain(layers: list[FragmentLinear], x: torch.Tensor, config: FragmentConfig) -> torch.Tensor:
    buffers = [torch.full_like(x, float("nan")) for _ in layers]
    for layer, buffer in zip(layers, buffers, strict=True):
        layer.forward_fused(x, buffer, config)
        x = buffer
    assert not x.isnan().any()
    return x


def fused(
    linear: FragmentLinear, x: torch.Tensor, config: FragmentConfig, next_split: int | None = None
) -> Run:
    linear.reserve([(x.shape[0], config)])
    return lambda y: linear.forward_fused(x, y, config, next_split)


def random_fragments(out: int, inputs: int) -> FragmentLayout:
    """Packed weights nobody rounded: for times, where the values only must not be special."""
    words = torch.randint(-(2**31), 2**31, (inputs // 128, out, 16), dtype=torch.int32, device="cuda")
    scales = (torch.rand(inputs // 128, out, device="cuda") * 0.01 + 0.001).half().view(torch.int16)
    return FragmentLayout(out, inputs, words, scales, None, True, False)


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(words_ptr, out_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads all words and writes next to nothing."""
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        found ^= tl.load(words_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.xor_sum(found))


class Shape:
    """Copies of one layer in every form, enough of them to overflow the cache."""

    def __init__(self, name: str, workspace: LinearWorkspace) -> None:
        self.name = name
        self.size = out, inputs = SHAPES[name]
        copies = max(LAYERS_TIMED, -(-COLD_BYTES // (out * inputs // 2)))
        self.fragments = [FragmentLinear(random_fragments(out, inputs), workspace) for _ in range(copies)]
        few = max(LAYERS_TIMED, -(-COLD_BYTES // (out * inputs)))
        self.planes = [Int4Linear(random_layout(out, inputs), workspace) for _ in range(max(few, copies))]
        weights = [torch.randn(out, inputs, device="cuda").bfloat16() * 0.02 for _ in range(few)]
        self.plain = [pack(w, None, workspace) for w in weights]
        self.read_out = torch.empty(4096, dtype=torch.int32, device="cuda")

    def link_copies(self) -> None:
        for one, following in zip(self.fragments, self.fragments[1:] + self.fragments[:1], strict=True):
            one.following = following

    def buffers(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        out, inputs = self.size
        x = torch.randn(tokens, inputs, device="cuda").bfloat16()
        return x, torch.empty(tokens, out, device="cuda", dtype=torch.bfloat16)

    def read(self, linear: FragmentLinear) -> None:
        words = linear.layout.words
        read_kernel[(528,)](words, self.read_out, words.numel(), BLOCK=4096, num_warps=8)

    def measure(self, tokens: int, configs: list[FragmentConfig], repeats: int, others: bool) -> list[Timing]:
        """Each configuration; with `others`, also cuBLAS, the kernel of planes and only reading."""
        self.link_copies()
        x, y = self.buffers(tokens)
        kinds: list[tuple[str, FragmentConfig | None, list[Callable[[], object]]]] = []
        if others:
            kinds.append(("cublas", None, [partial(linear.forward, x, y) for linear in self.plain]))
            kinds.append(("planes", None, [partial(linear.forward, x, y) for linear in self.planes]))
            kinds.append(("read", None, [partial(self.read, linear) for linear in self.fragments]))
        kinds += [
            ("fragments", c, [partial(fused(linear, x, c, c.split), y) for linear in self.fragments])
            for c in configs
        ]
        times = time_in_turns([calls for _, _, calls in kinds], repeats)
        return [
            Timing(self.name, tokens, kind, us / len(calls), config)
            for (kind, config, calls), us in zip(kinds, times, strict=True)
        ]


def best_of(timings: list[Timing], shape: str, tokens: int) -> list[Timing]:
    here = [t for t in timings if (t.shape, t.tokens, t.kind) == (shape, tokens, "fragments")]
    return sorted(here, key=lambda t: t.us)


def variants(config: FragmentConfig) -> list[FragmentConfig]:
    """How it starts and what it sends for: all that `measure` did not have."""
    sent = [
        replace(config, is_dependent=early, follow_mib=mib) for early in (False, True) for mib in FOLLOW_MIB
    ]
    none = [replace(config, is_dependent=early, follow_mib=0) for early in (False, True)]
    return [c for c in none + sent if c != config]


MODES: dict[str, tuple[bool, bool, bool]] = {
    "plain": (False, False, False),
    "early": (True, False, False),
    "sent": (False, True, True),
    "model": (False, True, False),
    "both": (True, True, True),
}
"""Started early; weights sent for; also by qkv."""


def measure_layers(shapes: list[Shape], tokens: int, timings: list[Timing], repeats: int) -> list[Timing]:
    """The linears of whole layers in turn, in every mode."""
    buffers = [shape.buffers(tokens) for shape in shapes]
    alone = [best_of(timings, shape.name, tokens)[0].config for shape in shapes]
    best = [config for config in alone if config is not None]
    calls: dict[str, list[Callable[[], object]]] = {k: [] for k in ("cublas", "planes", *MODES, "best")}
    order = [shape.fragments[layer] for layer in range(LAYERS_TIMED) for shape in shapes]
    for one, following in zip(order, order[1:] + order[:1], strict=True):
        one.following = following
    for layer in range(LAYERS_TIMED):
        for index, (shape, (x, y), config) in enumerate(zip(shapes, buffers, best, strict=True)):
            linear, next_split = shape.fragments[layer], best[(index + 1) % len(best)].split
            calls["cublas"].append(partial(shape.plain[layer].forward, x, y))
            calls["planes"].append(partial(shape.planes[layer].forward, x, y))
            for mode, (early, sent, from_qkv) in MODES.items():
                mib = (config.follow_mib or 8) if sent and (from_qkv or shape.name != "qkv") else 0
                mine = replace(config, is_dependent=early, follow_mib=mib)
                calls[mode].append(partial(fused(linear, x, mine, next_split), y))
            calls["best"].append(partial(fused(linear, x, config, next_split), y))
    times = time_in_turns(list(calls.values()), repeats)
    return [Timing("layers", tokens, k, us / LAYERS_TIMED) for k, us in zip(calls, times, strict=True)]


def compile_all(jobs: list[tuple[FragmentLinear, int, torch.dtype, FragmentConfig]]) -> None:
    """Compile what these would launch, on all processors at once."""
    with triton.AsyncCompileMode(ThreadPoolExecutor(os.cpu_count())):
        for linear, tokens, dtype, config in jobs:
            layout = linear.layout
            x = torch.empty(tokens, layout.num_in, device="cuda", dtype=dtype)
            out = torch.empty(tokens, layout.num_out + 32, device="cuda", dtype=dtype)[:, 16:-16]
            linear.compile_fused(x, out, config)


def describe(timing: Timing) -> str:
    c = timing.config
    assert c is not None
    tile = f"{c.block_m}x{c.block_out}/{c.split} w{c.num_warps} s{c.num_stages} a{c.ahead}"
    how = f"{' scaled' if c.is_scaled else ''}{' early' if c.is_dependent else ''} f{c.follow_mib}"
    return f"{tile}{how} {timing.us:.1f}"


def as_source(config: FragmentConfig) -> str:
    numbers = (
        config.block_m,
        config.block_out,
        config.split,
        config.num_warps,
        config.num_stages,
        config.ahead,
    )
    tail = ", is_scaled=True" if config.is_scaled else ""
    tail += ", is_dependent=True" if config.is_dependent else ""
    tail += f", follow_mib={config.follow_mib}" if config.follow_mib != 8 else ""
    return f"FragmentConfig({', '.join(map(str, numbers))}{tail})"


def show(timings: list[Timing], tokens_list: tuple[int, ...]) -> None:
    print(
        "\nshapes      M   cublas   planes     read     best  ratio % bw  six best || the best one's variants"
    )
    for tokens in tokens_list:
        for shape in SHAPES:
            us = {t.kind: t.us for t in timings if (t.shape, t.tokens) == (shape, tokens)}
            ranked = best_of(timings, shape, tokens)
            share = 100 * num_bytes(shape, tokens) / ranked[0].us / (READ_GBS * 1e3)
            first = ranked[0].config
            assert first is not None
            how = " ".join(
                f"{'early' if c.is_dependent else 'plain'}{c.follow_mib}:{t.us:.1f}"
                for t in ranked
                if (c := t.config)
                and c == replace(first, is_dependent=c.is_dependent, follow_mib=c.follow_mib)
            )
            columns = " ".join(f"{us[k]:8.1f}" for k in ("cublas", "planes", "read"))
            six = " | ".join(map(describe, ranked[:6]))
            print(
                f"{shape:8} {tokens:4} {columns} {ranked[0].us:8.1f} {us['cublas'] / ranked[0].us:6.2f} "
                f"{share:4.0f}  {six} || {how}"
            )
    print("\nfastest alone, as cuda_fragment_config writes them")
    for tokens in tokens_list:
        for shape in SHAPES:
            config = best_of(timings, shape, tokens)[0].config
            assert config is not None
            print(f"  {tokens:4} _{shape.upper()}: {as_source(config)},")
    print("\nlayers: microseconds of one layer's linears; ratio of cuBLAS to the fastest")
    for tokens in tokens_list:
        us = {t.kind: t.us for t in timings if (t.shape, t.tokens) == ("layers", tokens)}
        ratios = {k: us["cublas"] / v for k, v in us.items() if k not in ("cublas", "planes")}
        mode = max(ratios, key=lambda k: ratios[k])
        bar = BARS.get(tokens, 0.0)
        print(
            f"  M {tokens:4} "
            + " ".join(f"{k} {v:.1f}" for k, v in us.items())
            + f"  {mode} {ratios[mode]:.2f}, model {ratios['model']:.2f}, wanted {bar:.2f}: "
            + ("met" if ratios[mode] >= bar else "MISSED")
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer numbers of tokens and repeats")
    parser.add_argument("--out", help="write all times there as JSON")
    options = parser.parse_args()
    torch.manual_seed(int(time.time()))
    start = time.perf_counter()
    tokens_list = (1, 16, 32, 64, 128) if options.quick else (1, 8, 16, 32, 64, 96, 128, 256, 512)
    repeats = 7 if options.quick else 15
    workspace = LinearWorkspace("cuda", torch.bfloat16, 512)
    shapes = [Shape(name, workspace) for name in SHAPES]
    jobs = []
    for case in CASES:
        _, linear = packed(case)
        linear.following = linear
        for tokens in (t for t in CHECKED_TOKENS if t <= FUSED_TOKENS):
            usual = fragment_config(tokens, linear.layout.rows, linear.layout.k_tiles)
            configs = [usual, *configs_to_check(tokens, case, linear)]
            jobs += [(linear, tokens, case.dtype, c) for c in configs]
    for shape in shapes:
        shape.link_copies()
        one = shape.fragments[0]
        jobs += [(one, t, torch.bfloat16, c) for t in tokens_list for c in candidates(t, one.layout)]
    compile_all(jobs)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    comparison, wrong = Comparison(), set[FragmentConfig]()
    for case in CASES:
        check(comparison, case, wrong)
    check_chain(comparison)
    seconds = time.perf_counter() - start
    print(f"{comparison.compared} products held to float64 in {seconds:.0f} s, {len(comparison.wrong)} wrong")
    print("\n".join(comparison.wrong[:40]), flush=True)
    if len(comparison.wrong) > comparison.compared // 2:
        sys.exit("most are wrong: nothing is timed")
    timings: list[Timing] = []
    for tokens in tokens_list:
        for shape in shapes:
            configs = [c for c in candidates(tokens, shape.fragments[0].layout) if kernel_of(c) not in wrong]
            timings += shape.measure(tokens, configs, repeats, others=True)
    print(f"configurations timed after {time.perf_counter() - start:.0f} s", flush=True)
    again: dict[tuple[int, int], list[FragmentConfig]] = {}
    for tokens in tokens_list:
        for index, shape in enumerate(shapes):
            best = [t.config for t in best_of(timings, shape.name, tokens)[:2] if t.config is not None]
            again[tokens, index] = [v for config in best for v in variants(config)]
    compile_all(
        [(shapes[i].fragments[0], t, torch.bfloat16, c) for (t, i), more in again.items() for c in more]
    )
    for (tokens, index), more in again.items():
        timings += shapes[index].measure(tokens, more, repeats, others=False)
    print(f"variants timed after {time.perf_counter() - start:.0f} s", flush=True)
    for tokens in tokens_list:
        timings += measure_layers(shapes, tokens, timings, 2 * repeats)
    show(timings, tokens_list)
    device = torch.cuda.get_device_name()
    if options.out:
        result = {"device": device, "wrong": comparison.wrong, "timings": [asdict(t) for t in timings]}
        Path(options.out).write_text(json.dumps(result))
    print(f"{time.perf_counter() - start:.0f} s")
    layers = {f"{t.tokens}/{t.kind}": round(t.us, 1) for t in timings if t.shape == "layers"}
    print(json.dumps({"device": device, "us_per_layer": layers}))


if __name__ == "__main__":
    main()
