"""What adapters cost on a GPU: `lora`'s kernels checked and timed at the shape of an 8B Llama.

Claims: 64 adapters of rank 16 on all seven linears cost 32 decode layers at most 2.6 ms at 64 and at 256
rows; one adapter costs at most 5 % of a step, decoding or in a prefill of 8,192 tokens. Layers are real ones
but for attention: products, write_kv, norms and SiLU, with and without adapters, as captured graphs over
several layers of distinct memory, so that no cache holds them. Without --quick, configurations of the kernels
are timed side by side. The exit status says whether a check failed. A rehearsal compiles everything, in
processes side by side, before the first of them.

    python -m benchmarks.cuda.lora [--quick] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cuda.lora_layers import PAGE_BYTES, SHAPES, SPEC, Base, Pool, Step, segments_of, uniform, zipf
from benchmarks.cuda.lora_timing import (
    MODEL_LAYERS,
    UNFIT,
    WRONG,
    check_graph,
    measure,
    per_launch,
    rehearsal,
    say,
    say_wrong,
    tune,
)
from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.execution.cuda_adapters import CudaAdapters
from polybatch.kernels.lora import work
from polybatch.kernels.lora.work import GROUPS

BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}


def attempt(check: Callable[..., None], *args: Any) -> None:
    """What a check finds wrong is said at once, and by the exit status; the rest is still measured."""
    try:
        check(*args)
    except (AssertionError, *UNFIT) as error:
        say_wrong(f"{check.__name__}: {type(error).__name__}: {error}")


def check_all(results: dict, seed: int) -> None:
    """Mixed ranks, gains, biases, missing modules, long and short segments, padded rows."""
    rng = np.random.default_rng(seed)
    worst = {}
    for dtype in BOUNDS:
        ranks = []
        for _ in range(6):
            some = [m for m in SHAPES if rng.random() < 0.8]
            ranks.append({m: (int(rng.choice([0, 1, 4, 16, 17, 64, 200])), rng.random() < 0.3,
                              rng.random() < 0.3) for m in some})  # fmt: skip
        pool = Pool(ranks, 2, dtype)
        segments = [(0, 1, 0), (1, 17, 1), (17, 50, 2), (53, 54, 3), (54, 190, 4), (190, 448, 5)]
        for wide in (False, True):
            step = Step(pool, segments, 450, wide=wide)
            for group in range(len(GROUPS)):
                what = f"{dtype} wide={wide} {GROUPS[group]}"
                try:
                    error = step.check(group, 1)
                except (AssertionError, *UNFIT) as reason:
                    say_wrong(f"{what}: {type(reason).__name__}: {reason}")
                    continue
                worst[str(dtype)] = max(worst.get(str(dtype), 0.0), error)
                if not error < BOUNDS[dtype]:
                    say_wrong(f"{what}: relative error {error:.2e}")
    results["errors"] = worst
    say("relative errors against float64: " + ", ".join(
        f"{kind} {error:.1e}" for kind, error in worst.items()
    ))  # fmt: skip


def check_load(results: dict) -> None:
    """CudaAdapters on the device: rows arrive where the words say; time of a load of 84 MB."""
    spec = SPEC
    arena = torch.full((spec.num_layers, 128, PAGE_BYTES), 0xFF, dtype=torch.uint8, device="cuda")
    adapters = CudaAdapters(spec, arena, torch.bfloat16)
    deltas = {m: ModuleDelta(torch.randn(16, i), torch.randn(16, o)) for m, (o, i) in SHAPES.items()}
    weights = AdapterWeights("timed", tuple(deltas for _ in range(spec.num_layers)))
    begin = time.perf_counter()
    adapters.prepare(weights)
    prepare_s = time.perf_counter() - begin
    count = adapters.pages_needed(weights)
    times = []
    for first in (0, count, 1, 0):
        pages = tuple(range(first, first + count))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        adapters.load(weights, pages)
        queued_s = time.perf_counter() - begin
        adapters.wait(["timed"])
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    (index,) = adapters.place(["timed"], {"timed": pages})
    words, template = adapters.words.cpu(), adapters.templates[index]
    for layer in (0, 31):
        flat = arena[layer].view(torch.bfloat16).view(-1)
        start = int(words[template[3, work.MODULE] + 2 + 15]) * 32
        assert torch.equal(flat[start : start + 4096].cpu(), deltas["down_proj"].b[15].bfloat16())
    size = count * PAGE_BYTES * spec.num_layers
    results["load"] = {"bytes": size, "s": min(times), "queued_s": queued_s, "prepare_s": prepare_s}
    print(f"load of {size / 1e6:.0f} MB: {min(times) * 1e3:.2f} ms ({size / min(times) / 1e9:.0f} GB/s), "
          f"queued in {queued_s * 1e3:.2f} ms, laid out once in {prepare_s * 1e3:.0f} ms")  # fmt: skip


def run(results: dict, layers: int, seed: int, *, is_quick: bool) -> None:
    """Checks, then times."""
    begin = time.perf_counter()
    for index in range(1 if is_quick else 4):
        attempt(check_all, results, seed + index)
    pool, base = Pool(uniform(64, 16), layers, torch.bfloat16), Base(layers)
    cases = {
        "no adapter, 64 rows": ([], 64),
        "no adapter, 256 rows": ([], 256),
        "1 adapter, 1 row": (segments_of([1]), 1),
        "1 adapter, 64 rows": (segments_of([64]), 64),
        "1 adapter, 256 rows": (segments_of([256]), 256),
        "8 adapters, 256 rows": (segments_of([32] * 8), 256),
        "64 adapters, 64 rows": (segments_of([1] * 64), 64),
        "64 adapters, 256 rows": (segments_of([4] * 64), 256),
        "64 Zipf, 64 rows": (zipf(64, 64), 64),
        "64 Zipf, 256 rows": (zipf(64, 256), 256),
        "1 adapter in 128 of 256 rows": ([(128, 256, 0)], 256),
    }
    steps = {name: Step(pool, segments, rows, wide=False) for name, (segments, rows) in cases.items()}
    for name in ("1 adapter, 256 rows", "64 Zipf, 256 rows", "1 adapter in 128 of 256 rows"):
        attempt(check_graph, name, steps[name], base)
    say(f"checked in {time.perf_counter() - begin:.0f} s; what follows is for {MODEL_LAYERS} layers, in ms")
    for name, step in steps.items():
        measure(name, step, base, results["steps"])
        if name not in ("no adapter, 64 rows", "1 adapter, 1 row", "8 adapters, 256 rows"):
            per_launch(name, step, base, results["launches"])
    for name, counts in (("1 adapter, 8192 tokens", [8192]), ("25 adapters, 8192 tokens", [327] * 25)):
        step = Step(pool, segments_of(counts), sum(counts), wide=True, is_fused=True)
        measure(name, step, base, results["steps"], 5)
        per_launch(name, step, base, results["launches"])
    if not is_quick:
        tune(pool, base, results["tuning"])


def empty_results() -> dict:
    return {"errors": {}, "wrong": WRONG, "steps": [], "launches": {}, "tuning": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict = {"device": torch.cuda.get_device_name()} | empty_results()
    layers, seed = 8, time.time_ns() % 2**31
    begin = time.perf_counter()
    with rehearsal(os.cpu_count() or 1) as (compiler, wrong):
        run(empty_results(), 1, seed, is_quick=options.quick)
        print(f"{len(compiler.calls)} kernels noted in {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    for error in wrong:
        say_wrong(f"does not compile: {error}")
    try:
        attempt(check_load, results)
        run(results, layers, seed, is_quick=options.quick)
    finally:
        # An error of the device ends the run; what was measured until then stays.
        print(f"{time.perf_counter() - begin:.0f} s in all")
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        print(json.dumps(results), flush=True)
    if WRONG:
        sys.exit("wrong: " + "; ".join(WRONG))


if __name__ == "__main__":
    main()
