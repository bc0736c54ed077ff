"""What the card can do at best, read through torch in the same run as the measurements beside it.

    python -m benchmarks.cuda.ceilings

Claim: nothing that reads memory or multiplies matrices through the vendor's libraries runs much faster.
Reads: a sum over 4 GiB, and a copy of as much counting both directions; the better counts. Matmul: all fused
linear shapes of a layer at 8192 rows, operations over time. Linear layers: the four fused ones of every layer
and the head, each with weights of its own, so that the cache flatters nothing, in one CUDA graph. On the CPU,
for trials, everything runs smaller and without a graph.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.cuda.floors import Ceilings
from polybatch.bench.roofline import Limits
from polybatch.config import ModelSpec
from polybatch.models.random_weights import open_random

ROWS = 8192
READ_BYTES = 4 * 2**30
BATCHES = (1, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Readings:
    """sum_gbs, copy_gbs: GB/s of a sum, and of a copy counting bytes read and written.

    matmul_tflops: by (out, in). linears_ms: batch -> milliseconds of all linear layers and the head.
    """

    sum_gbs: float
    copy_gbs: float
    matmul_tflops: dict[str, float]
    matmul_all_tflops: float
    linears_ms: dict[int, float]

    @property
    def ceilings(self) -> Ceilings:
        limits = Limits(max(self.sum_gbs, self.copy_gbs), {"bfloat16": 1000 * self.matmul_all_tflops})
        return Ceilings(limits, self.linears_ms)


def measure(
    spec: ModelSpec, device: str = "cuda", batches: Sequence[int] = BATCHES, rows: int = ROWS
) -> Readings:
    """Read the card; takes about ten seconds, and the memory of the model's weights."""
    is_cuda = device.startswith("cuda")
    with torch.inference_mode():
        sum_gbs, copy_gbs = _reads_gbs(READ_BYTES if is_cuda else READ_BYTES >> 6, device)
        tflops, total = {}, [0.0, 0.0]
        for out, width in fused_shapes(spec):
            x, weight = _random((rows, width), device), _random((out, width), device)
            spent = seconds(_matmul(x, weight), device)
            flops = 2 * rows * out * width
            tflops[f"{out}x{width}"] = round(flops / spent / 1e12, 1)
            total = [total[0] + flops, total[1] + spent]
        return Readings(
            sum_gbs=sum_gbs,
            copy_gbs=copy_gbs,
            matmul_tflops=tflops,
            matmul_all_tflops=round(total[0] / total[1] / 1e12, 1),
            linears_ms=_linears_ms(spec, device, batches),
        )


def fused_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(out, in) of a layer's linears with q, k and v, and gate and up, fused."""
    hidden, ff = spec.hidden_size, spec.intermediate_size
    return [(spec.q_size + 2 * spec.kv_size, hidden), (hidden, spec.q_size), (2 * ff, hidden), (hidden, ff)]


def _reads_gbs(num_bytes: int, device: str) -> tuple[float, float]:
    """GB/s of a sum over so many bytes, and of copying them."""
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    sum_s = seconds(lambda: source.sum(), device)
    copy_s = seconds(lambda: target.copy_(source), device)
    return round(num_bytes / sum_s / 1e9, 1), round(2 * num_bytes / copy_s / 1e9, 1)


def _linears_ms(spec: ModelSpec, device: str, batches: Sequence[int]) -> dict[int, float]:
    shapes = [*fused_shapes(spec) * spec.num_layers, (spec.vocab_size, spec.hidden_size)]
    weights = [_random(shape, device) for shape in shapes]
    measured = {}
    for batch in batches:
        inputs = {width: _random((batch, width), device) for _, width in shapes}
        pairs = [(inputs[weight.shape[1]], weight) for weight in weights]

        def run(pairs: list[tuple[torch.Tensor, torch.Tensor]] = pairs) -> None:
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)

        measured[batch] = round(1000 * seconds(as_graph(run, device), device), 4)
    return measured


def as_graph(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The replay of a call captured as a CUDA graph; the call itself on other devices."""
    if not device.startswith("cuda"):
        return call
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds(call: Callable[[], object], device: str, runs: int = 11, warmup: int = 3) -> float:
    """Median seconds of a call on the device."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(runs):
        if device.startswith("cuda"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def _random(shape: tuple[int, int], device: str) -> torch.Tensor:
    # Zeros multiply faster than data does.
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _matmul(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.ceilings", description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", help="a random configuration")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    print(json.dumps(asdict(measure(open_random(arguments.model)[0].spec, arguments.device))))


if __name__ == "__main__":
    main()
