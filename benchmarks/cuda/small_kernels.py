"""The small kernels on one GPU: right against float64, then their time beside the bytes they must move.

    python -m benchmarks.cuda.small_kernels [--quick] [--json FILE]

Claim: each of write_kv, rms_norm with residual, silu_mul and embedding moves its bytes near the card's read
bandwidth at 8,192 tokens and costs a launch at 1; greedy sampling of [256, 128256] costs at most 25 µs beyond
reading the logits; the token of a drawn row is that of float64 but for rounding at an edge. Shapes are those
of Llama-3.1-8B in bfloat16. Times are of CUDA graphs that go over enough distinct buffers that the L2 cache
holds none of them. Outputs are filled with NaN, inputs fresh; a check that fails ends the run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from polybatch.kernels.activation.cuda import _silu_mul, silu_mul
from polybatch.kernels.embedding.cuda import _embedding, embedding
from polybatch.kernels.norm.cuda import _rms_norm, rms_norm
from polybatch.kernels.sample.cuda import DeviceSampler, SampleParams, _finish, _measure_spans
from polybatch.kernels.sample.cuda_truncate import _truncate
from polybatch.kernels.write_kv.cuda import _write_kv, rope_table, write_kv
from polybatch.kernels.write_kv.reference import write_kv as write_kv_reference

HIDDEN, HEADS, KV_HEADS, DIM, FF, VOCAB, PAGE = 4096, 32, 8, 128, 14336, 128256, 16
CACHE_BYTES = 200 * 2**20
DEVICE = "cuda"
KINDS: dict[str, tuple[float, int, float, float]] = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "plain": (1.0, 0, 1.0, 0.0),
    "top_k 50": (1.0, 50, 1.0, 0.0),
    "top_p 0.9": (1.0, 0, 0.9, 0.0),
    "top_k 50, top_p 0.9, min_p 0.05": (0.7, 50, 0.9, 0.05),
    "min_p 0.05": (1.0, 0, 1.0, 0.05),
    "top_p 0.99 of flat logits": (5.0, 0, 0.99, 0.0),
}
"""Name -> temperature, top_k, top_p, min_p."""


def microseconds(calls: list[Callable[[], Any]], replays: int) -> float:
    """Median time of a call in a graph of all of them."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return sorted(times)[replays // 2]


def copies(num_bytes: int) -> int:
    return max(2, min(64, -(-CACHE_BYTES // num_bytes)))


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def nans(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.full(shape, torch.nan, device=DEVICE, dtype=dtype)


def rotary(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    inv_freq = 500000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
    return inv_freq, rope_table(inv_freq, 1.0, positions).to(DEVICE)


def near(what: str, got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    """Raise unless got is expected but for limit, relative to the larger of each value and 1."""
    error = ((got.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)).max().item()
    if not error <= limit:
        raise SystemExit(f"{what}: relative error {error:.2e}, allowed {limit:.0e}")


def check_rows() -> None:
    """Norm, activation, embedding and write_kv against float64 at odd shapes."""
    for dtype, limit in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        for rows, width in ((1, 576), (3, 4096), (5, 5120), (2, 16384), (7, 97)):
            x, residual, weight = (randn(*s, dtype=dtype) for s in ((rows, width), (rows, width), (width,)))
            whole = (x + residual).double()
            expected = whole * (whole.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.double()
            out = nans(rows, width, dtype=dtype)
            rms_norm(x, weight, 1e-5, residual=residual, out=out)
            near("rms_norm", out, expected, limit)
            near("residual", residual, whole, limit)
            gate_up, out = randn(rows, 2 * width, dtype=dtype) * 4, nans(rows, width, dtype=dtype)
            gate, up = gate_up.double().chunk(2, 1)
            near("silu_mul", silu_mul(gate_up, out=out), functional.silu(gate) * up, limit)
            table, ids = randn(11, width, dtype=dtype), torch.arange(rows, device=DEVICE, dtype=torch.int32)
            got = embedding(ids, ids // 2 - 1, ids.flip(0) + 1, table, out=nans(rows, width, dtype=dtype))
            late = torch.where(ids < 2, ids, rows - (ids // 2 - 1))
            near("embedding", got, table[late.long()], 0.0)
        for heads, kv_heads, dim, with_norm in (
            (32, 8, 128, 0),
            (16, 2, 64, 1),
            (5, 5, 80, 1),
            (8, 4, 256, 0),
        ):
            rows, pages = 37, nans(9, 2, kv_heads, PAGE, dim, dtype=dtype)
            qkv, bias = (
                randn(rows, (heads + 2 * kv_heads) * dim, dtype=dtype),
                randn((heads + 2 * kv_heads) * dim, dtype=dtype),
            )
            slots = torch.randperm(9 * PAGE, device=DEVICE)[:rows].int()
            positions = torch.randint(0, 1 << 17, (rows,), device=DEVICE, dtype=torch.int32)
            inv_freq = 1e4 ** -(torch.arange(dim // 2) / (dim // 2))
            table = rope_table(inv_freq, 1.0, 1 << 17).to(DEVICE)
            norms: dict[str, Any] = {
                "q_norm": randn(dim, dtype=dtype),
                "k_norm": randn(dim, dtype=dtype),
                "eps": 1e-6,
            }
            q, k, v = (qkv + bias).view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
            expected_pages = torch.full_like(pages, torch.nan, dtype=torch.float32)
            if not with_norm:
                norms = {}
            wide = {name: x.float() if isinstance(x, torch.Tensor) else x for name, x in norms.items()}
            expected = write_kv_reference(
                q.float(), k.float(), v.float(), positions, slots.long(), inv_freq.to(DEVICE), 1.0,
                expected_pages, **wide,
            )  # fmt: skip
            got = write_kv(qkv, positions, slots, table, pages, bias=bias, **norms)
            # A rotation's errors are as large as its head's largest values, whatever comes out.
            scale = expected.abs().amax(-1, keepdim=True).clamp(min=1)
            near("write_kv q", got / scale, expected / scale, max(limit, 1e-4))
            if not torch.equal(pages.isnan(), expected_pages.isnan()):
                raise SystemExit("write_kv wrote slots that are not its own")
            pages, expected_pages = pages.nan_to_num(), expected_pages.nan_to_num()
            scale = expected_pages.abs().amax(-1, keepdim=True).clamp(min=1)
            near("write_kv pages", pages / scale, expected_pages / scale, max(limit, 1e-4))


def parameters(rows: int, kind: tuple[float, int, float, float]) -> SampleParams:
    temperature, top_k, top_p, min_p = kind

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=DEVICE)

    wide = torch.float64
    return SampleParams(
        column(temperature, torch.float32), column(top_k, torch.int32), column(top_p, wide),
        column(min_p, wide), torch.rand(rows, dtype=wide, device=DEVICE),
    )  # fmt: skip


def distance(row: torch.Tensor, kind: tuple[float, int, float, float], number: float, token: int) -> float:
    """Share of the mass between the number and the token's part of the distribution; 0 inside it."""
    temperature, top_k, top_p, min_p = kind
    scaled = row.float() / torch.tensor(temperature, device=DEVICE)
    is_cut = top_k > 0 or top_p < 1 or min_p > 0
    order = scaled.argsort(descending=True, stable=True) if is_cut else torch.arange(len(row), device=DEVICE)
    order = order[: top_k or None]
    weights = (scaled[order].double() - scaled.max()).exp()
    before = weights.cumsum(0) - weights
    weights = weights * (((before < top_p * weights.sum()) & (weights >= min_p)) | (before == 0))
    sums = weights.cumsum(0) / weights.sum()
    place = (order == token).nonzero()
    if not len(place):
        return 1.0
    at = int(place[0, 0])
    high, low = float(sums[at]), float(sums[at] - weights[at] / weights.sum())
    return max(low - number, number - high, 0.0)


def check_sampling(rows: int, vocabs: tuple[int, ...]) -> dict[str, float]:
    """Largest distance per kind, over normal, tied and bfloat16 logits; ends the run beyond 1e-5."""
    worst: dict[str, float] = {}
    for name, kind in KINDS.items():
        for vocab in vocabs:
            logits = randn(rows, vocab, dtype=torch.float32) * 3
            logits[rows // 2 :] = logits[rows // 2 :].round()
            for held in (logits, logits.bfloat16()):
                params = parameters(rows, kind)
                tokens, finite = torch.full((2, rows), -7, dtype=torch.int32, device=DEVICE)
                sampler = DeviceSampler(rows, vocab, DEVICE)
                sampler.sample(held, params, tokens, finite)
                if not bool((finite == 1).all()):
                    raise SystemExit(f"{name}: a finite row was flagged")
                if kind[0] == 0:
                    best = (held == held.max(1, keepdim=True).values).int().argmax(1)
                    far = float((tokens != best).any())
                else:
                    numbers = params.uniform.tolist()
                    far = max(distance(held[i], kind, numbers[i], int(tokens[i])) for i in range(rows))
                worst[name] = max(worst.get(name, 0.0), far)
                alone = torch.full((1,), -7, dtype=torch.int32, device=DEVICE)
                last = SampleParams(*(getattr(params, field)[-1:] for field in SampleParams.__slots__))
                sampler.sample(held[-1:], last, alone, torch.zeros_like(alone))
                if int(alone) != int(tokens[-1]):
                    raise SystemExit(f"{name}: a row alone gives another token than in its batch")
        if worst[name] > 1e-5:
            raise SystemExit(f"{name}: a token is {worst[name]:.1e} of the mass away from its number")
    return worst


def time_rows(rows: int, replays: int) -> list[dict[str, Any]]:
    """Time and GB/s of the four row kernels."""
    found = []
    _, table = rotary(8192)
    ids = torch.randint(0, VOCAB, (rows,), device=DEVICE, dtype=torch.int32)
    none = torch.full_like(ids, -1)
    weight, embeddings = randn(HIDDEN), randn(VOCAB, HIDDEN)
    positions = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    pages = randn(max(rows // PAGE, 1) * 2, 2, KV_HEADS, PAGE, DIM)
    slots = torch.randperm(len(pages) * PAGE, device=DEVICE)[:rows].int()
    width = (HEADS + 2 * KV_HEADS) * DIM

    def kv() -> Callable[[], Any]:
        qkv = randn(rows, width)
        return lambda: write_kv(qkv, positions, slots, table, pages)

    def norm() -> Callable[[], Any]:
        x, residual = randn(rows, HIDDEN), randn(rows, HIDDEN)
        return lambda: rms_norm(x, weight, 1e-5, residual=residual, out=x)

    def silu() -> Callable[[], Any]:
        gate_up, out = randn(rows, 2 * FF), nans(rows, FF)
        return lambda: silu_mul(gate_up, out=out)

    def embed() -> Callable[[], Any]:
        out = nans(rows, HIDDEN)
        return lambda: embedding(ids, none, ids, embeddings, out=out)

    cases = (
        ("write_kv", 4 * width, kv),
        ("norm+residual", 8 * HIDDEN, norm),
        ("silu_mul", 6 * FF, silu),
        ("embedding", 4 * HIDDEN, embed),
    )
    for name, row_bytes, make in cases:
        us = microseconds([make() for _ in range(copies(rows * row_bytes))], replays)
        found.append({"kernel": name, "rows": rows, "us": us, "gbs": rows * row_bytes / us / 1000})
    return found


def time_sampling(rows: int, replays: int) -> list[dict[str, Any]]:
    """Time of sampling, and beside it of reading the logits once (a sum by torch)."""
    num_bytes = 4 * rows * VOCAB
    held = [randn(rows, VOCAB, dtype=torch.float32) * 3 for _ in range(copies(num_bytes))]
    sampler = DeviceSampler(rows, VOCAB, DEVICE)
    tokens, finite = torch.zeros(2, rows, dtype=torch.int32, device=DEVICE)
    out = torch.empty(rows, device=DEVICE)

    def reading(logits: torch.Tensor) -> Callable[[], Any]:
        return lambda: torch.sum(logits, 1, out=out)

    def sampling(logits: torch.Tensor, params: SampleParams, is_cut: bool) -> Callable[[], Any]:
        return lambda: sampler.sample(logits, params, tokens, finite, may_truncate=is_cut)

    us = microseconds([reading(logits) for logits in held], replays)
    found: list[dict[str, Any]] = [
        {"kernel": "sum (torch)", "rows": rows, "us": us, "gbs": num_bytes / us / 1000}
    ]
    for name, kind in KINDS.items():
        params, is_cut = parameters(rows, kind), kind[1] > 0 or kind[2] < 1 or kind[3] > 0
        us = microseconds([sampling(logits, params, is_cut) for logits in held], replays)
        found.append({"kernel": f"sample: {name}", "rows": rows, "us": us, "gbs": num_bytes / us / 1000})
    return found


def registers() -> list[dict[str, Any]]:
    """Registers and spilled bytes of every compiled variant."""
    found = []
    for kernel in (_write_kv, _rms_norm, _silu_mul, _embedding, _measure_spans, _finish, _truncate):
        for cache in kernel.device_caches.values():
            for variant in cache[0].values():
                found.append(
                    {"kernel": kernel.fn.__name__, "registers": variant.n_regs, "spills": variant.n_spills}
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.manual_seed(torch.seed() % 2**31)
    replays = 5 if options.quick else 15
    check_rows()
    worst = check_sampling(*((4, (VOCAB, 32001)) if options.quick else (16, (VOCAB, 49152, 32001))))
    token_counts = [1, 256, 8192] if options.quick else [1, 64, 256, 8192]
    batches = [1, 256] if options.quick else [1, 64, 256]
    results = {
        "device": torch.cuda.get_device_name(),
        "distance": worst,
        "rows": [row for count in token_counts for row in time_rows(count, replays)],
        "sampling": [row for count in batches for row in time_sampling(count, replays)],
        "registers": registers(),
    }
    for row in results["rows"] + results["sampling"]:
        print(f"{row['kernel']:42s} {row['rows']:5d} rows {row['us']:9.2f} µs {row['gbs']:8.0f} GB/s")
    spilled = [row for row in results["registers"] if row["spills"]]
    print(f"{len(results['registers'])} variants, spilling: {spilled or 'none'}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps({"small_kernels": {"distance": max(worst.values())}}))


if __name__ == "__main__":
    main()
