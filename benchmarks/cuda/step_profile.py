"""Where the time of a decode step goes, on the device and in Python.

    python -m benchmarks.cuda.step_profile --batch 1,64,256 [--adapters 64] [--quantization int4]

For each batch size: the wall time of a step, the device's time by kernel, the host's time by phase, and the
gaps between. Steps run as the engine runs them, planned one ahead. Random weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from contextlib import closing
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cuda.adapters import RandomAdapters
from polybatch.adapters.store import AdapterStore
from polybatch.engine.llm import LLM
from polybatch.request import SamplingParams

CONTEXT, WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 480, 12, 32, 4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random:llama-3.1-8b")
    parser.add_argument("--batch", default="1,64,256")
    parser.add_argument("--adapters", type=int, default=0, help="of rank 16, round robin over the rows")
    parser.add_argument("--quantization")
    parser.add_argument("--memory", default="48GiB")
    parser.add_argument("--top", type=int, default=12, help="kernels to list")
    arguments = parser.parse_args(argv)
    with closing(
        LLM(arguments.model, device="cuda", memory=arguments.memory, max_model_len=1024,
            quantization=arguments.quantization)
    ) as llm:  # fmt: skip
        names = _register(llm, arguments.adapters)
        found = {}
        for batch in map(int, arguments.batch.split(",")):
            found[str(batch)] = measure(llm, batch, names, arguments.top)
    print(json.dumps(found))


def measure(llm: LLM, batch: int, names: list[str], top: int) -> dict[str, Any]:
    """Decode `batch` rows; prints a table and returns its figures."""
    core = llm.core
    generator = torch.Generator().manual_seed(batch)
    for row in range(batch):
        prompt = torch.randint(0, llm.spec.vocab_size, (CONTEXT,), generator=generator).tolist()
        params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
        core.add_request(f"{batch}-{row}", prompt, params, names[row % len(names)] if names else None)
    while core.stats().scheduler.num_running < batch:
        core.step()
    for _ in range(WARM_STEPS):
        core.step()
    torch.cuda.synchronize()
    before, start = core.stats().times, time.perf_counter()
    for _ in range(TIMED_STEPS):
        core.step()
    torch.cuda.synchronize()
    wall = 1000 * (time.perf_counter() - start) / TIMED_STEPS
    after = core.stats().times
    phases = {
        name: round(1000 * (getattr(after, name) - getattr(before, name)) / TIMED_STEPS, 3)
        for name in ("plan_s", "forward_s", "sample_s", "commit_s", "output_s")
    }
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(PROFILED_STEPS):
            core.step()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels[event.name][0] += event.device_time_total / 1000 / PROFILED_STEPS
            kernels[event.name][1] += 1 / PROFILED_STEPS
    busy = sum(total for total, _ in kernels.values())
    print(
        f"B={batch}, {len(names)} adapters: {wall:.2f} ms a step, {busy:.2f} ms in kernels; host ms {phases}"
    )
    ordered = sorted(kernels.items(), key=lambda item: -item[1][0])
    for name, (total, count) in ordered[:top]:
        print(f"  {total:7.3f} ms  {count:6.1f} x  {1000 * total / count:8.1f} us  {name[:90]}")
    for row in range(batch):
        core.abort(f"{batch}-{row}")
    return {
        "wall_ms": wall,
        "busy_ms": busy,
        "host_ms": phases,
        "kernels": dict(ordered[:40]),
    }


def _register(llm: LLM, count: int) -> list[str]:
    store = llm.core.store
    if not count or not isinstance(store, AdapterStore):
        return []
    ranks = {f"adapter-{i}": 16 for i in range(count)}
    RandomAdapters(llm.spec, device="cuda").register(store, ranks)
    return list(ranks)


if __name__ == "__main__":
    main()
