"""What adapters cost the compiled CPU executor: steps of W4 and W5 with and without them, turn by turn.

    python -m benchmarks.cpu.adapter_kernels --dtype bfloat16 --out adapter-kernels.json

Claim: adapters of mixed ranks keep nearly as much of the base model's speed as equal small ones. Each mix is
laid out as the workload has it, all requests at once: one decode step of every request, and the prompts in
prefill steps of the token budget. A turn times every one of them with the adapters and right after without,
and the median of the turns' ratios is reported, so a slow spell of the machine meets both sides. `share`
weighs prefill and decode as the workload does and stands for the workload's throughput over that of its
base; `w5_to_w4` compares the two mixes.

`adapter_mib` is what a decode step reads of adapters at least; `gbs` says how fast that went if nothing
overlapped. Adapters are random; the model is the real one, so matmuls have real shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict
from pathlib import Path

from polybatch.adapters.peft_lora import load_peft
from polybatch.bench import meter, workloads
from polybatch.bench.random_adapters import write_adapters
from polybatch.bench.runner import adapter_cache
from polybatch.execution.cpu import CpuExecutor, available_processors
from polybatch.kernels.cpu.layout import ITEM_BYTES, PAGE_TOKENS
from polybatch.models.loader import load_model
from polybatch.models.weights import ModelWeights
from polybatch.request import AdapterRef, Request, SamplingParams, Sequence
from polybatch.scheduling.plan import AdapterLoad, Chunk, LogitRows, StepPlan

MIXES = ("W4", "W5")
BUDGET_TOKENS = 2048


class Mix:
    """One workload's requests on an executor of its own, in two copies: with their adapters and without."""

    def __init__(self, name: str, model: ModelWeights, dtype: str, quantization: str | None, threads: int):
        self.workload = workloads.make(name, 0, model.spec.vocab_size)
        used = dict.fromkeys(r.adapter for r in self.workload.requests if r.adapter is not None)
        folders = write_adapters(model.spec, self.workload.adapters, adapter_cache())
        by_name = {adapter: load_peft(folders[adapter], model) for adapter in used}
        lengths = [len(r.token_ids) + 1 for r in self.workload.requests]
        num_pages = 2 * sum(-(-length // PAGE_TOKENS) for length in lengths)
        options = {"dtype": dtype, "quantization": quantization, "threads": threads}
        limits = {
            "max_num_tokens": BUDGET_TOKENS,
            "max_num_seqs": 2 * len(lengths),
            "max_model_len": self.workload.max_model_len,
        }
        # Rows that share no page would take a page each; what is not needed is never touched.
        num_pages += sum(14 * w.max_rank for w in by_name.values())
        self.executor = CpuExecutor(model, num_pages=num_pages, **options, **limits)  # type: ignore[arg-type]
        self.host = {w.digest: w for w in by_name.values()}
        refs = {a: AdapterRef(a, w.digest, self.executor.adapter_pages(w)) for a, w in by_name.items()}
        self._next_page = 0
        self.resident = {ref.digest: self._take(ref.num_pages) for ref in refs.values()}
        self.loads = tuple(AdapterLoad(ref, self.resident[ref.digest]) for ref in refs.values())
        self.adapted = [self._sequence(r, refs.get(r.adapter or "")) for r in self.workload.requests]
        self.plain = [self._sequence(r, None) for r in self.workload.requests]
        rows = sum(
            d.rank * (d.a.shape[1] + d.b.shape[1])
            for w in by_name.values()
            for layer in w.layers
            for d in layer.values()
        )
        self.adapter_bytes = rows * ITEM_BYTES[dtype]

    def _take(self, count: int) -> tuple[int, ...]:
        self._next_page += count
        return tuple(range(self._next_page - count, self._next_page))

    def _sequence(self, request: workloads.BenchRequest, ref: AdapterRef | None) -> Sequence:
        tokens = (*request.token_ids, 100)
        seq = Sequence(Request("r", tokens, SamplingParams(), max_tokens=1, seed=0, adapter=ref))
        seq.pages = list(self._take(-(-len(tokens) // PAGE_TOKENS)))
        return seq

    def _forward(self, chunks: SequenceOf[Chunk], loads: tuple[AdapterLoad, ...] = ()) -> float:
        plan = StepPlan(chunks=tuple(chunks), loads=loads, resident=self.resident)
        start = time.perf_counter()
        self.executor.forward(plan, self.host)
        return time.perf_counter() - start

    def load(self) -> float:
        """Seconds to load all adapters into their pages."""
        return self._forward((), self.loads)

    def decode(self, seqs: SequenceOf[Sequence]) -> float:
        """Seconds of the first decode step of all requests; it may be run again."""
        return self._forward([Chunk(seq, len(seq.tokens) - 1, 1, LogitRows.LAST) for seq in seqs])

    def prefill(self, seqs: SequenceOf[Sequence]) -> float:
        """Seconds to compute all prompts, in order, in steps of the token budget."""
        seconds, room = 0.0, BUDGET_TOKENS
        chunks: list[Chunk] = []
        for seq in seqs:
            at, end = 0, len(seq.tokens) - 1
            while at < end:
                count = min(room, end - at)
                rows = LogitRows.LAST if at + count == end else LogitRows.NONE
                chunks.append(Chunk(seq, at, count, rows))
                at, room = at + count, room - count
                if room == 0:
                    seconds += self._forward(chunks)
                    chunks, room = [], BUDGET_TOKENS
        return seconds + (self._forward(chunks) if chunks else 0.0)

    def measure(self, turns: int, decodes: int) -> dict[str, float]:
        """Medians over the turns; times in ms, ratios as base over adapted."""
        load_ms = self.load() * 1e3
        self.prefill(self.adapted), self.prefill(self.plain)
        samples: dict[str, list[float]] = {}
        steps = self.workload.requests[0].max_tokens - 1
        for _ in range(turns):
            prefill = [self.prefill(seqs) for seqs in (self.adapted, self.plain)]
            pairs = [(self.decode(self.adapted), self.decode(self.plain)) for _ in range(decodes)]
            decode = [statistics.median(side) for side in zip(*pairs, strict=True)]
            total = [p + steps * d for p, d in zip(prefill, decode, strict=True)]
            for kind, (adapted, plain) in (("prefill", prefill), ("decode", decode), ("total", total)):
                samples.setdefault(f"{kind}_ms", []).append(adapted * 1e3)
                samples.setdefault(f"{kind}_base_ms", []).append(plain * 1e3)
                samples.setdefault("share" if kind == "total" else f"{kind}_share", []).append(
                    plain / adapted
                )
        result = {key: round(statistics.median(values), 4) for key, values in samples.items()}
        extra_s = (result["decode_ms"] - result["decode_base_ms"]) / 1e3
        result["adapter_mib"] = round(self.adapter_bytes / 2**20, 1)
        result["gbs"] = round(self.adapter_bytes / 1e9 / extra_s, 1) if extra_s > 0 else float("inf")
        result["load_ms"] = round(load_ms, 1)
        return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.adapter_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--mixes", default=",".join(MIXES))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--decodes", type=int, default=9, help="decode steps of either side per turn")
    parser.add_argument("--threads", type=int, default=available_processors())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    model = load_model(arguments.model).weights
    results: dict[str, dict[str, float]] = {}
    for name in arguments.mixes.split(","):
        mix = Mix(name, model, arguments.dtype, arguments.quantization, arguments.threads)
        results[name] = mix.measure(arguments.turns, arguments.decodes)
        mix.executor.close()
        print(name, results[name], file=sys.stderr)
    content: dict[str, object] = {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "threads": arguments.threads,
        "machine": asdict(meter.machine()),
        "mixes": results,
    }
    if set(MIXES) <= set(results):
        content["w5_to_w4"] = round(results["W5"]["share"] / results["W4"]["share"], 4)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
