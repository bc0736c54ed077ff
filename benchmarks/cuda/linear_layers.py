"""The 4-bit linears of whole layers: what is sent for early, of a product's own weights or of the next one's.

    python -m benchmarks.cuda.linear_layers [--out linear_layers.json]

Claim: at 1 to 64 rows a layer is faster if each product sends, while its own last weights arrive, for the
first ones of the next (`follow_mib`). Timed like "layers" of benchmarks.cuda.linear, twice: products back to
back, and with a small kernel before each, as a model has them, where the first of a layer sends nothing
because attention lies behind it. Before that, the results of linked layers that feed each other are held bit
for bit to those of ordinary launches.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton

from benchmarks.cuda.linear import LAYERS_TIMED, SHAPES, random_layout, run_chain, time_in_turns
from polybatch.kernels.linear.cuda import Int4Linear, LinearWorkspace, link_products
from polybatch.kernels.linear.cuda_config import Int4Config, int4_config

TOKENS = (1, 16, 32, 64, 128)
REPEATS = 25
Change = Callable[[Int4Config], Int4Config]


def wide_tiles(config: Int4Config) -> Int4Config:
    """Tiles of 128 rows where the inputs are not split and rows of x are many."""
    if config.split > 1 or config.block_out > 64 or config.block_m < 64:
        return replace(config, follow_mib=4)
    return replace(config, block_out=128, num_warps=8, is_scaled=True, follow_mib=4)


VARIANTS: dict[str, Change] = {
    "chosen": lambda c: c,
    "ordinary": lambda c: replace(c, is_dependent=False),
    "own4": lambda c: replace(c, is_dependent=True, prefetch_mib=4),
    "follow2": lambda c: replace(c, follow_mib=2),
    "follow4": lambda c: replace(c, follow_mib=4),
    "follow8": lambda c: replace(c, follow_mib=8),
    "sent2": lambda c: replace(c, is_dependent=False, follow_mib=2),
    "sent4": lambda c: replace(c, is_dependent=False, follow_mib=4),
    "sent8": lambda c: replace(c, is_dependent=False, follow_mib=8),
    "sent16": lambda c: replace(c, is_dependent=False, follow_mib=16),
    "late4": lambda c: replace(c, is_dependent=True, prefetch_mib=0, follow_mib=4),
    "wide4": wide_tiles,
}
"""chosen: cuda_config's. ordinary and sent: no early start. own: MiB of a product's own weights."""


def layers(workspace: LinearWorkspace) -> list[dict[str, Int4Linear]]:
    made = [
        {name: Int4Linear(random_layout(*shape), workspace) for name, shape in SHAPES.items()}
        for _ in range(LAYERS_TIMED)
    ]
    link_products([linear for layer in made for linear in layer.values()])
    made[-1]["down"].following = made[0]["qkv"]
    return made


def config_of(linear: Int4Linear, tokens: int, change: Change) -> Int4Config:
    config = change(int4_config(tokens, linear.layout.rows, linear.layout.k_tiles))
    linear.reserve([(tokens, config)])
    return config


def tensors(tokens: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    made = {name: (torch.randn(tokens, i), torch.empty(tokens, o)) for name, (o, i) in SHAPES.items()}
    return {name: (x.cuda().bfloat16(), y.cuda().bfloat16()) for name, (x, y) in made.items()}


def compile_all(layer: dict[str, Int4Linear]) -> None:
    with triton.AsyncCompileMode(ThreadPoolExecutor(os.cpu_count())):
        for tokens in TOKENS:
            for name, (x, y) in tensors(tokens).items():
                for change in VARIANTS.values():
                    layer[name].compile_fused(x, y, config_of(layer[name], tokens, change))


def check() -> list[str]:
    """Which variants change a bit of what layers compute that feed each other."""
    workspace = LinearWorkspace("cuda", torch.bfloat16, 512)
    chain = [Int4Linear(random_layout(4096, 4096), workspace) for _ in range(12)]
    link_products(chain)
    wrong = []
    for tokens in TOKENS:
        x = torch.randn(tokens, 4096, device="cuda").bfloat16()
        ordinary = run_chain(chain, x, config_of(chain[0], tokens, VARIANTS["ordinary"]))
        for name, change in VARIANTS.items():
            config = config_of(chain[0], tokens, change)
            # Scaled weights are rounded once more.
            if not config.is_scaled and not torch.equal(run_chain(chain, x, config), ordinary):
                wrong.append(f"{name} at {tokens} rows: other bits than an ordinary launch")
    return wrong


def measure(made: list[dict[str, Int4Linear]], tokens: int, apart: bool) -> dict[str, float]:
    """Microseconds of a layer for each variant that differs from those before it."""
    buffers = tensors(tokens)
    calls: dict[str, list[Callable[[], object]]] = {}
    seen: set[tuple[Int4Config, ...]] = set()
    for name, change in VARIANTS.items():
        configs = {key: config_of(made[0][key], tokens, change) for key in SHAPES}
        if tuple(configs.values()) in seen:
            continue
        seen.add(tuple(configs.values()))
        calls[name] = []
        for layer in made:
            for key, (x, y) in buffers.items():
                if apart:
                    calls[name].append(partial(torch.mul, x, 1.0, out=x))
                config = configs[key]
                if apart and key == "qkv":
                    config = replace(config, follow_mib=0)
                calls[name].append(partial(layer[key].forward_fused, x, y, config))
    times = time_in_turns(list(calls.values()), REPEATS)
    return {name: round(us / len(made), 2) for name, us in zip(calls, times, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="write all times there as JSON")
    options = parser.parse_args()
    start = time.perf_counter()
    made = layers(LinearWorkspace("cuda", torch.bfloat16, 512))
    compile_all(made[0])
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    wrong = check()
    if wrong:
        sys.exit("\n".join(wrong))
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "argv": sys.argv[1:]}
    for apart in (False, True):
        title = "apart" if apart else "together"
        print(f"{title}, microseconds a layer")
        for tokens in TOKENS:
            times = measure(made, tokens, apart)
            result[f"{title}/{tokens}"] = times
            print(f"  M {tokens:4} " + " ".join(f"{name} {us:.1f}" for name, us in times.items()), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(result))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
