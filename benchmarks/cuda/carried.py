"""An adapter in the base model's products: right against float64, then `cuda_carried`'s choices timed.

    python -m benchmarks.cuda.carried [--quick] [--json FILE] [--device cpu]

Claims: h of rank 16 on all linears takes a layer of Llama-3.1-8B at most 25 µs at up to 512 rows; spare
columns cost a product at most 4 %. Times are of captured graphs over layers of distinct memory, which take
turns. `shrink` alone finds A and x in the L2 cache, so its times compare blockings; "carried" has the weights
in between, as in a step. --quick times only what is chosen. --device cpu, with TRITON_INTERPRET=1, only
checks, on a tiny model. The exit status is 1 if a check fails, and nothing is timed then.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.cuda.lora import BOUNDS
from benchmarks.cuda.lora_layers import SPEC, Pool, distance, uniform
from benchmarks.cuda.lora_timing import WRONG, replays_ms
from polybatch.config import ModelSpec
from polybatch.execution.cuda_model import FUSED
from polybatch.kernels.activation.cuda import silu_mul
from polybatch.kernels.interpret import is_interpreted, prepare
from polybatch.kernels.linear.cuda import FloatLinear
from polybatch.kernels.lora import carried, cuda_carried
from polybatch.kernels.lora.carried import SPARE
from polybatch.kernels.lora.cuda_carried import BLOCKINGS, SILU_ROWS, SILU_TILES, Blocking, Carrier
from polybatch.kernels.lora.work import group_shapes
from polybatch.kernels.rehearsal import rehearsal

TINY = replace(
    SPEC, hidden_size=48, intermediate_size=80, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16
)
LAYERS, RANK = 8, 16
Launch = Callable[[int], Any]  # of a layer
Tiles = tuple[int, int, int, int]
PRODUCTS = tuple(FUSED)
DOWN = PRODUCTS.index("down")
# Each blocking is checked, and silu_mul where it takes over.
CHECKED_ROWS = (16, 256, 700, SILU_ROWS + 51)
ROWS = (1, 64, 256, 512, 1024, 2048, 8192)
NOW, NOW_TILES = [blocking for _, blocking in BLOCKINGS], [SILU_TILES]
CANDIDATES = [
    *NOW, Blocking(16, 256, 1, 4, 4), Blocking(16, 256, 4, 4, 5), Blocking(16, 512, 4, 4, 3),
    Blocking(16, 512, 8, 8, 3), Blocking(16, 128, 4, 4, 6), Blocking(32, 128, 1, 4, 4),
    Blocking(64, 64, 1, 4, 5), Blocking(64, 128, 1, 4, 4), Blocking(128, 128, 1, 8, 3),
]  # fmt: skip
TILES = [*NOW_TILES, (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 8, 3), (32, 64, 4, 3)]


class Model:
    """A model's products with spare columns, and pages that hold one random adapter on all linears."""

    def __init__(self, spec: ModelSpec, num_layers: int, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.shapes = group_shapes(spec.linear_shapes)
        self.pool = Pool(uniform(1, RANK), num_layers, dtype, spec.linear_shapes, device)
        self.layers: list[list[FloatLinear]] = [[] for _ in range(num_layers)]
        for layer, (shape, spare) in itertools.product(self.layers, zip(self.shapes, SPARE, strict=True)):
            zeros = torch.zeros(sum(shape.outs), shape.num_in, dtype=dtype, device=device)
            layer.append(FloatLinear(zeros, spare))
            layer[-1].weight[:, shape.num_in :] = torch.nan
        weights = [[linear.weight for linear in layer] for layer in self.layers]
        self.carrier = Carrier(weights, self.shapes, self.pool.memory, self.pool.words)

    def step(self, first_row: int, last_row: int) -> torch.Tensor:
        """`lora_carried` on the device, for these rows of a step; the adapter stands in the columns."""
        views = {name: np.zeros(shape, kind) for name, (shape, kind) in carried.arrays().items()}
        carried.fill(views, first_row, last_row, self.pool.templates[0])
        on = torch.from_numpy(views["lora_carried"]).to(self.device)
        self.carrier.take("random", self.pool.templates[0], on)
        return on

    def inputs(self, group: int, num_rows: int) -> torch.Tensor:
        """Random x, its spare elements NaN."""
        num_in = self.shapes[group].num_in
        x = torch.full((num_rows, num_in + SPARE[group]), torch.nan, dtype=self.dtype, device=self.device)
        x[:, :num_in].normal_()
        return x

    def outputs(self, group: int, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, sum(self.shapes[group].outs), dtype=self.dtype, device=self.device)

    def shrink(self, group: int, x: torch.Tensor, on: torch.Tensor) -> Launch:
        return lambda layer: self.carrier.shrink(group, layer, x, on)

    def silu_mul(self, gate_up: torch.Tensor, x: torch.Tensor, on: torch.Tensor) -> Launch:
        return lambda layer: self.carrier.silu_mul(layer, gate_up, x, on)

    def product(self, group: int, x: torch.Tensor, y: torch.Tensor) -> Launch:
        return lambda layer: self.layers[layer][group].forward(x, y)


def check(model: Model, num_rows: int, layer: int = 1) -> tuple[float, list[str]]:
    """The worst relative error against float64, the adapter's rows in the middle of a step; what is wrong.

    The base model's weights must still be 0: nothing hides the adapter's part.
    """
    first, last = num_rows // 5, num_rows - num_rows // 4
    on, errors, wrong = model.step(first, last), [], []

    def compare(group: int, x: torch.Tensor, what: str) -> None:
        y = model.outputs(group, num_rows)
        model.product(group, x, y)(layer)
        given = x[:, : model.shapes[group].num_in]
        expected = model.pool.expected(group, layer, given, torch.zeros_like(y), [(first, last, 0)])
        errors.append(distance(y, expected))
        if not errors[-1] < BOUNDS[model.dtype]:
            wrong.append(f"{what} of {num_rows} rows: relative error {errors[-1]:.2e}")
        if not bool((y[:first] == 0).all() and (y[last:] == 0).all()):
            wrong.append(f"{what} of {num_rows} rows: rows without the adapter are not 0")

    for group, product in enumerate(PRODUCTS):
        x = model.inputs(group, num_rows)
        model.shrink(group, x, on)(layer)
        compare(group, x, product)
    if model.carrier.takes_silu(num_rows):
        x, gate_up = model.inputs(DOWN, num_rows), model.outputs(DOWN - 1, num_rows).normal_()
        model.silu_mul(gate_up, x, on)(layer)
        compare(DOWN, x, "down after silu_mul")
        if not torch.equal(x[:, : model.shapes[DOWN].num_in], silu_mul(gate_up)):
            wrong.append(f"silu_mul of {num_rows} rows differs from the plain one")
    return max(errors), wrong


def name_of(b: Blocking) -> str:
    return f"{b.tokens}x{b.columns}/{b.split} w{b.num_warps} s{b.num_stages}"


def under(choice: Blocking | Tiles, launch: Launch) -> Launch:
    """The launch with this choice of `cuda_carried`."""
    wanted = {"BLOCKINGS": ((1 << 30, choice),)} if isinstance(choice, Blocking) else {"SILU_TILES": choice}

    def changed(layer: int) -> None:
        with patch.multiple(cuda_carried, **wanted):
            launch(layer)

    return changed


def layer_us(model: Model, launches: Sequence[Launch]) -> list[float]:
    """Microseconds of each launch, in graphs of all layers."""
    layers = range(len(model.layers))
    milliseconds = replays_ms([partial(lambda run: [*map(run, layers)], launch) for launch in launches])
    return [round(1000 * ms / len(layers), 2) for ms in milliseconds]


def time_shrink(model: Model, num_rows: int, blockings: Sequence[Blocking]) -> dict[str, dict[str, float]]:
    """Microseconds by blocking and product."""
    on, times = model.step(0, num_rows), []
    for group in range(len(PRODUCTS)):
        launch = model.shrink(group, model.inputs(group, num_rows), on)
        times.append(layer_us(model, [under(each, launch) for each in blockings]))
    return {
        name_of(each): dict(zip(PRODUCTS, us, strict=True))
        for each, *us in zip(blockings, *times, strict=True)
    }


def time_silu(model: Model, num_rows: int, tiles: Sequence[Tiles]) -> dict[str, float]:
    """Microseconds by tile; "plain": of the kernel after which `shrink` of down is still to come."""
    on, x = model.step(0, num_rows), model.inputs(DOWN, num_rows)
    gate_up, out = model.outputs(DOWN - 1, num_rows).normal_(), x[:, : model.shapes[DOWN].num_in]
    tiled = model.silu_mul(gate_up, x, on)
    launches = [lambda _: silu_mul(gate_up, out=out), *(under(each, tiled) for each in tiles)]
    return dict(zip(["plain", *map(str, tiles)], layer_us(model, launches), strict=True))


def time_products(model: Model, num_rows: int) -> dict[str, dict[str, float]]:
    """Microseconds by product: plain, with the spare columns, and with `shrink` before that."""
    on, found = model.step(0, num_rows), {}
    for group, product in enumerate(PRODUCTS):
        x, y = model.inputs(group, num_rows).nan_to_num_(), model.outputs(group, num_rows)
        plain = model.product(group, x[:, : model.shapes[group].num_in], y)
        both = model.shrink(group, x, on), model.product(group, x, y)
        times = layer_us(model, [plain, both[1], partial(lambda both, i: [run(i) for run in both], both)])
        found[product] = dict(zip(("plain", "wide", "carried"), times, strict=True))
    return found


def time_all(model: Model, blockings: Sequence[Blocking], tiles: Sequence[Tiles]) -> dict[str, Any]:
    """Compile, time, and print a table of each; weights become random."""
    for layer, (group, shape) in itertools.product(model.layers, enumerate(model.shapes)):
        layer[group].weight[:, : shape.num_in].normal_(std=0.02)
    on, x, gate_up = model.step(0, 1), model.inputs(DOWN, 1), model.outputs(DOWN - 1, 1)
    with rehearsal(os.cpu_count() or 1):
        for blocking in blockings:
            under(blocking, model.shrink(DOWN, x, on))(0)
        for each in tiles:
            under(each, model.silu_mul(gate_up, x, on))(0)
    shrinks = {rows: time_shrink(model, rows, blockings) for rows in ROWS}
    results: dict[str, Any] = {"shrink_us": shrinks, "product_us": {}}
    print("shrink of a layer, us" + "".join(f"{rows:8}" for rows in ROWS))
    for name in map(name_of, blockings):
        sums = [sum(of_rows[name].values()) for of_rows in shrinks.values()]
        print(f"{name:21}" + "".join(f"{us:8.1f}" for us in sums), flush=True)
    results["silu_mul_us"] = time_silu(model, ROWS[-1], tiles)
    print(f"silu_mul, {ROWS[-1]} rows, us: {results['silu_mul_us']}", flush=True)
    print("rows: plain, wide, carried product, us")
    for rows in ROWS:
        results["product_us"][rows] = found = time_products(model, rows)
        cells = ("{plain:7.1f} {wide:7.1f} {carried:7.1f}".format(**us) for us in found.values())
        print(f"{rows:5}: " + "  |".join(cells), flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    is_cpu = options.device == "cpu"
    if is_cpu and not is_interpreted():
        parser.error("--device cpu runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    prepare()
    # The interpreter cannot multiply matrices of bfloat16.
    model = Model(TINY, 2, torch.float16, "cpu") if is_cpu else Model(SPEC, LAYERS, torch.bfloat16, "cuda")
    results: dict[str, Any] = {"errors": {}, "wrong": (wrong := [])}
    for rows in CHECKED_ROWS:
        results["errors"][rows], found = check(model, rows)
        wrong += found
        print(f"{rows} rows: worst relative error {results['errors'][rows]:.2e}", flush=True)
    if not is_cpu and not wrong:
        results |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        results |= time_all(model, *((NOW, NOW_TILES) if options.quick else (CANDIDATES, TILES)))
        wrong += WRONG
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if wrong:
        raise SystemExit("wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
