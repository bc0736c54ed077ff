"""What this machine can do, read with torch: bandwidth from memory and rate of matrix products.

The weights that are read rotate through copies larger than the caches, as the layers of a model do.
Run it alone with `python -m polybatch.bench.limits`.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from polybatch.bench.roofline import Limits
from polybatch.config import ModelSpec, RopeSpec

ROWS = 1024
READ_BYTES = 512 * 2**20
ROTATED_BYTES = 96 * 2**20


def measure(spec: ModelSpec, num_threads: int) -> Limits:
    """Bandwidth and matmul rates of this process with so many threads; takes about ten seconds.

    The matmul rate of a type is the best over the model's own linear shapes at 1024 rows.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with torch.inference_mode():
            shapes = sorted(set(spec.linear_shapes.values()))
            gflops = {name: max(_gflops(name, shape) for shape in shapes) for name in _OPERANDS}
            return Limits(read_gbs=round(_read_gbs(), 2), gflops={k: round(v, 1) for k, v in gflops.items()})
    finally:
        torch.set_num_threads(before)


def _seconds(call: Callable[[], object], min_s: float = 0.2, runs: int = 3) -> float:
    """Median seconds of a call, after a first one that does not count."""
    call()
    start = time.perf_counter()
    call()
    repeat = max(3, int(min_s / max(time.perf_counter() - start, 1e-7)))
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        times.append((time.perf_counter() - start) / repeat)
    return statistics.median(times)


def _read_gbs() -> float:
    values = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _seconds(lambda: torch.sum(values)) / 1e9


def _float_matmul(dtype: torch.dtype, out: int, width: int, copies: int) -> Callable[[int], object]:
    x = torch.randn(ROWS, width, dtype=dtype)
    weights = [torch.randn(out, width, dtype=dtype) for _ in range(copies)]
    return lambda i: torch.nn.functional.linear(x, weights[i])


def _int8_matmul(out: int, width: int, copies: int) -> Callable[[int], object]:
    x = torch.randint(-127, 128, (ROWS, width), dtype=torch.int8)
    weights = [torch.randint(-127, 128, (width, out), dtype=torch.int8) for _ in range(copies)]
    return lambda i: torch._int_mm(x, weights[i])


_OPERANDS: dict[str, tuple[int, Callable[[int, int, int], Callable[[int], object]]]] = {
    "float32": (4, lambda out, width, copies: _float_matmul(torch.float32, out, width, copies)),
    "bfloat16": (2, lambda out, width, copies: _float_matmul(torch.bfloat16, out, width, copies)),
    "int8": (1, _int8_matmul),
}


def _gflops(name: str, shape: Sequence[int]) -> float:
    out, width = shape
    item_bytes, build = _OPERANDS[name]
    copies = max(1, -(-ROTATED_BYTES // (out * width * item_bytes)))
    matmul = build(out, width, copies)
    rotation = itertools.cycle(range(copies))
    return 2 * ROWS * out * width / _seconds(lambda: matmul(next(rotation))) / 1e9


def main() -> None:
    spec = ModelSpec("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, 1e-5, RopeSpec())
    print(json.dumps(asdict(measure(spec, torch.get_num_threads())), indent=1))


if __name__ == "__main__":
    main()
