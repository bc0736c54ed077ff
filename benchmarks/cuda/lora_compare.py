"""`lora`'s kernels beside those of before, and without one part of what is new at a time.

Claims: where all rows share an adapter, 32 decode layers of 256 rows get at least 0.5 ms back of the 1.8 ms
that adapters took; 64 adapters cost no more than before in any mix; every part is worth its lines.
Layers as in `lora`, 32 of them, captured as one graph per variant, which take turns. Results are checked
against float64 first.

    python -m benchmarks.cuda.lora_compare [--quick] [--json PATH]

Variants other than "before" and "now" are `polybatch.kernels.lora` with one edit, imported from a copy.
"groups of N": how many units of silu_mul have one block of columns done before the next. "no run branch":
silu_mul without what takes two tiles at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.cuda import lora_timing
from benchmarks.cuda.lora_before import cuda as cuda_before
from benchmarks.cuda.lora_before import cuda_fused as cuda_fused_before
from benchmarks.cuda.lora_before import work as work_before
from benchmarks.cuda.lora_layers import (
    KERNELS,
    Base,
    Kernels,
    Placement,
    Pool,
    Step,
    consumers,
    segments_of,
    uniform,
    zipf,
)  # fmt: skip
from benchmarks.cuda.lora_timing import UNFIT, WRONG, check_graph, rehearsal, replays_ms, say, say_wrong
from polybatch.kernels.lora import cuda_fused
from polybatch.kernels.lora.work import GROUPS

LAYERS, PREFILL_LAYERS = 32, 4
BOUND = 4e-3
# Variant -> edits: file of the package, what stands there, what stands there instead.
EDITS = {
    "groups of 32": [("cuda_fused", "UNIT_GROUP = 256", "UNIT_GROUP = 32")],
    "groups of 4": [("cuda_fused", "UNIT_GROUP = 256", "UNIT_GROUP = 4")],
    "groups of 1": [("cuda_fused", "UNIT_GROUP = 256", "UNIT_GROUP = 1")],
    "no run branch": [
        ("work", "RUN_ROWS, RUN_UNITS = 32, 2", "RUN_ROWS, RUN_UNITS = 16, 2"),
        ("cuda_silu_mul", "elif count > _TILE_ROWS:", "elif _RUN_ROWS > _TILE_ROWS:"),
    ],
}
# Those that change prefills.
PREFILL_EDITS: tuple[str, ...] = ()
QUICK = ("1 adapter x 256", "1 adapter x 64", "64 in turn x 64", "64 in turn x 256", "64 Zipf x 256")
BEFORE: Kernels = (work_before, cuda_before, cuda_fused_before)


def edited(folder: Path, name: str) -> Kernels:
    """The package's modules with one edit, as a package of their own in `folder`."""
    package = name.replace(" ", "_")
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    for path in Path(cuda_fused.__file__).parent.glob("*.py"):
        text = path.read_text()
        for file, what, instead in EDITS[name]:
            if path.stem == file:
                assert text.count(what) == 1, f"{name}: {what!r} is not once in {path.name}"
                text = text.replace(what, instead)
        if path.stem == "work" or path.stem.startswith("cuda"):
            (folder / package / path.name).write_text(text.replace("polybatch.kernels.lora.", f"{package}."))
    names = ("work", "cuda", "cuda_fused")
    work, cuda, fused = (importlib.import_module(f"{package}.{module}") for module in names)
    return work, cuda, fused


def cases() -> dict[str, tuple[list[tuple[int, int, int]], int]]:
    spread = segments_of([5 if n % 16 == 0 else 1 for n in range(64)])[:64]
    return {
        "1 adapter x 256": (segments_of([256]), 256),
        "1 adapter x 64": (segments_of([64]), 64),
        "8 adapters x 256": (segments_of([32] * 8), 256),
        "64 in turn x 64": (segments_of([1] * 64), 64),
        "64 in turn x 256": (segments_of([4] * 64), 256),
        "64 Zipf x 64": (zipf(64, 64), 64),
        "64 Zipf x 256": (zipf(64, 256), 256),
        "half base, 64 adapters x 256": ([(s + 176, e + 176, n) for s, e, n in spread], 256),
        "half base, 1 adapter x 256": ([(128, 256, 0)], 256),
        "1 adapter x 1": (segments_of([1]), 1),
    }


def check(pool: Pool, name: str, kernels: Kernels) -> float:
    """The worst relative error of any group; of what is to stay in all decode steps and a mixed one."""
    worst = 0.0
    mixed = ([(0, 1, 0), (1, 17, 1), (17, 50, 2), (53, 54, 3), (54, 190, 4), (190, 448, 5)], 450)
    steps = [(what, case, False) for what, case in cases().items() if case[1] == 256]
    steps += [("mixed", mixed, True), ("mixed, narrow", mixed, False)]
    for what, (segments, rows), wide in steps if name == "now" else steps[:1]:
        step = Step(pool, segments, rows, wide=wide, kernels=kernels)
        for group in range(len(GROUPS)):
            try:
                error = step.check(group, pool.memory.shape[0] - 1)
            except (AssertionError, *UNFIT) as reason:
                say_wrong(f"{name}, {what}, {GROUPS[group]}: {type(reason).__name__}: {reason}")
                continue
            worst = max(worst, error)
            if not error < BOUND:
                say_wrong(f"{name}, {what}, {GROUPS[group]}: relative error {error:.2e}")
    return worst


def ranks(seed: int) -> list[dict[str, tuple[int, bool, bool]]]:
    """Adapters of uneven ranks, some with gains, biases and modules missing."""
    modules = [module for group in GROUPS for module in group]
    return [
        {m: ((16, 4, 17, 64, 1, 40)[(n + i + seed) % 6], i == n, i == n + 1) for i, m in enumerate(modules)
         if (n + i) % 7 != 6}
        for n in range(64)
    ]  # fmt: skip


def run(
    variants: dict[str, Kernels], results: dict, layers: int, prefill_layers: int, is_quick: bool
) -> None:
    begin = time.perf_counter()
    odd = Pool(ranks(0), 2, torch.bfloat16)
    worst = {name: check(odd, name, kernels) for name, kernels in variants.items()}
    results["errors"] = worst
    say("relative errors against float64: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    del odd
    pool, base = Pool(uniform(64, 16), layers, torch.bfloat16), Base(layers)
    step = Step(pool, segments_of([256]), 256, wide=False)
    check_graph("1 adapter x 256", step, base)
    check_down(pool, base)
    say(f"checked in {time.perf_counter() - begin:.0f} s; ms of {LAYERS} layers, then what adapters add")
    for name, (segments, rows) in cases().items():
        if is_quick and name not in QUICK:
            continue
        compare(name, pool, base, variants, segments, rows, results)
    parts = {name: kernels for name, kernels in variants.items() if is_quick or name in ("before", "now")}
    for name in ("1 adapter x 256", "64 in turn x 64", "64 in turn x 256", "64 Zipf x 256"):
        launches(name, pool, base, parts, *cases()[name], results)
    base.layers = prefill_layers
    chosen = {name: variants[name] for name in ("before", "now", *PREFILL_EDITS)}
    for name, counts in (("1 adapter, 8192 tokens", [8192]), ("8 adapters, 8192 tokens", [1024] * 8)):
        if is_quick and len(counts) > 1:
            continue
        compare(name, pool, base, chosen, segments_of(counts), 8192, results, 5)
        if is_quick:
            continue
        launches(name, pool, base, parts, segments_of(counts), 8192, results)


def check_down(pool: Pool, base: Base) -> None:
    """A long chunk's layer whose silu_mul leaves h of down gives what shrink's h gives."""
    segments, rows = [(3, 1000, 0), (1000, 2040, 1)], 2048
    space, place, kept = base.buffers(rows), Placement(rows, torch.bfloat16), base.layers
    before, results, base.layers = {k: v.clone() for k, v in space.items()}, [], 1
    for is_fused in (False, True):
        for name, value in before.items():
            space[name].copy_(value)
        step = Step(pool, segments, rows, wide=True, is_fused=is_fused)
        step.lora.h.fill_(torch.nan)
        base.run(step, space, place, True)
        results.append({name: space[name].double() for name in ("hidden", "residual", "activated")})
    base.layers = kept
    if lora_timing._is_rehearsal:
        return
    apart, fused = results
    for name, wanted in apart.items():
        error = ((fused[name] - wanted).norm() / wanted.norm()).item()
        if not error < BOUND:
            say_wrong(f"down's h from silu_mul: {name} differs by {error:.2e}")


def compare(
    name: str, pool: Pool, base: Base, variants: dict[str, Kernels], segments: list, rows: int, results: dict,
    repeats: int = 10,
) -> None:  # fmt: skip
    """Times of the plain layers and of every variant, whose graphs take turns."""
    is_wide = rows > 1024
    space, place = base.buffers(rows), Placement(rows, torch.bfloat16)
    steps = {
        what: Step(pool, segments, rows, wide=is_wide, kernels=kernels, is_fused=what != "before")
        for what, kernels in variants.items()
    }
    if is_wide:
        steps["shrink of down apart"] = Step(pool, segments, rows, wide=True)
    plain, *others = steps.values()
    runs = [partial(base.run, plain, space, place, False)]
    runs += [partial(base.run, step, space, place, True) for step in (plain, *others)]
    if lora_timing._is_rehearsal:
        for launch in runs:
            launch()
        return
    times = [ms * LAYERS / base.layers for ms in replays_ms(runs, repeats)]
    added = {what: ms - times[0] for what, ms in zip(steps, times[1:], strict=True)}
    plans = {what: step.plan_s * 1e6 for what, step in steps.items() if what in ("before", "now")}
    results["steps"].append({"name": name, "plain_ms": times[0], "added_ms": added, "plan_us": plans})
    say(f"{name}: plain {times[0]:.2f}; " + ", ".join(f"{what} {ms:.2f}" for what, ms in added.items())
        + "; plan us " + " -> ".join(f"{us:.0f}" for us in plans.values()))  # fmt: skip


def launches(
    name: str, pool: Pool, base: Base, variants: dict[str, Kernels], segments: list, rows: int, results: dict
) -> None:
    """Microseconds of each kernel alone, over layers of distinct memory: plain, then every variant."""
    steps = [
        Step(pool, segments, rows, wide=rows > 1024, kernels=kernels, is_fused=what != "before")
        for what, kernels in variants.items()
    ]
    space = base.buffers(rows)
    found: dict[str, list[float]] = {}
    if len(steps) > 2:  # variants of silu_mul, beside which the norms and write_kv are the same
        firsts = [consumers(step, base)["silu_mul"] for step in steps]
        found["silu_mul"] = [lora_timing._us(kernel, base.layers) for kernel in
                             (firsts[0][0], *(fused for _, fused in firsts))]  # fmt: skip
        norms = [consumers(step, base)["norm of o"] for step in steps[:2]]
        found["norm of o"] = [lora_timing._us(kernel, base.layers) for kernel in
                              (norms[0][0], *(fused for _, fused in norms))]  # fmt: skip
        results["launches"][name] = found
        names = ["plain", *variants]
        say(f"{name}, us a layer: " + "; ".join(
            f"{k}: " + ", ".join(f"{n} {t:.1f}" for n, t in zip(names, v, strict=False))
            for k, v in found.items()
        ))  # fmt: skip
        return
    for what, (plain, first) in consumers(steps[0], base).items():
        others = [consumers(step, base)[what][1] for step in steps[1:]]
        found[what] = [lora_timing._us(kernel, base.layers) for kernel in (plain, first, *others)]
    for group, source in enumerate(("hidden", "attention", "hidden", "activated")):

        def shrink(i: int, step: Step, group: int = group, x: torch.Tensor = space[source]) -> None:
            step.lora.shrink(group, i, x, *step.args(i))

        found[f"shrink {GROUPS[group][0]}"] = [
            lora_timing._us(partial(shrink, step=step), base.layers) for step in steps
        ]
    results["launches"][name] = found
    say(f"{name}, us a layer: " + ", ".join(
        f"{k} {' -> '.join(f'{t:.1f}' for t in v)}" for k, v in found.items()
    ))  # fmt: skip


def all_variants(folder: Path) -> dict[str, Kernels]:
    sys.path.insert(0, str(folder))
    return {"before": BEFORE, "now": KERNELS} | {name: edited(folder, name) for name in EDITS}


def places(variants: dict[str, Kernels]) -> list[tuple[ModuleType, ModuleType]]:
    """What `rehearsal` must know of all variants but "now"."""
    return [(cuda, fused) for name, (_, cuda, fused) in variants.items() if name != "now"]


def empty_results() -> dict:
    return {"wrong": WRONG, "steps": [], "launches": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict = {"device": torch.cuda.get_device_name()} | empty_results()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        variants = all_variants(Path(folder))
        with rehearsal(os.cpu_count() or 1, places(variants)) as (compiler, wrong):
            run(variants, empty_results(), 1, 1, options.quick)
            print(f"{len(compiler.calls)} kernels noted in {time.perf_counter() - begin:.0f} s", flush=True)
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
        for error in wrong:
            say_wrong(f"does not compile: {error}")
        try:
            run(variants, results, LAYERS, PREFILL_LAYERS, options.quick)
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
