"""Run workloads on Polybatch in this process: the engine as benchmarks see it, and the loop around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polybatch.bench import meter, workloads
from polybatch.bench.results import Result, Timed, record
from polybatch.bench.workloads import BenchRequest, Workload
from polybatch.config import ModelSpec
from polybatch.models.builtin import cache_dir
from polybatch.models.loader import load_model
from polybatch.request import SamplingParams

if TYPE_CHECKING:
    from polybatch.engine.llm import LLM

WARMUP_RUN = 999
WARMUP_REQUESTS = 16


class PolybatchEngine:
    """An `LLM` behind the two calls that every benchmarked engine answers: `stream` and `batch`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @staticmethod
    def _params(request: BenchRequest) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)

    def stream(self, request: BenchRequest) -> Timed:
        """One request alone; every token stamped when it is out."""
        stamps: list[float] = []
        tokens: list[int] = []
        start = time.perf_counter()
        prompt = list(request.token_ids)
        for output in self.llm.stream(prompt, self._params(request), adapter=request.adapter):
            new = output.outputs[0].token_ids[len(tokens) :]
            stamps += [time.perf_counter() - start] * len(new)
            tokens += new
        return Timed(time.perf_counter() - start, [tokens], stamps)

    def batch(self, requests: Sequence[BenchRequest]) -> Timed:
        """All requests at once."""
        prompts = [list(request.token_ids) for request in requests]
        params = [self._params(request) for request in requests]
        adapters = [request.adapter for request in requests]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, adapter=adapters)
        return Timed(time.perf_counter() - start, [output.outputs[0].token_ids for output in outputs])

    def run(self, workload: Workload) -> Timed:
        return self.stream(workload.requests[0]) if workload.is_stream else self.batch(workload.requests)


def is_sane(engine: PolybatchEngine, vocab_size: int) -> bool | None:
    """Whether the sanity prompt goes on as it must; None for models that it is not made for."""
    if vocab_size != workloads.SANITY_VOCAB_SIZE:
        return None
    timed = engine.stream(BenchRequest(workloads.SANITY_PROMPT, 1))
    return list(timed.tokens[0]) == [workloads.SANITY_NEXT]


def run_workloads(
    names: Sequence[str],
    load: Callable[[Workload], LLM],
    *,
    vocab_size: int,
    label: str,
    version: str,
    num_runs: int = 3,
    wait: bool = True,
    num_requests: int | None = None,
) -> Iterator[Result]:
    """Measure each workload, `num_runs` timed runs after a warm-up; yields results as they are ready.

    load: gives a fresh LLM with the workload's adapters registered; it is closed after the workload.
    wait: wait for an idle machine before each run. Peak memory is this process's, earlier workloads included.
    """
    for name in names:
        start = time.perf_counter()
        llm = load(workloads.make(name))
        try:
            result = Result(f"polybatch:{label}", name, version, load_s=round(time.perf_counter() - start, 2))
            engine = PolybatchEngine(llm)
            result.sane = is_sane(engine, vocab_size)
            start = time.perf_counter()
            engine.run(workloads.make(name, WARMUP_RUN, vocab_size).head(WARMUP_REQUESTS))
            result.warmup_s = round(time.perf_counter() - start, 2)
            for run in range(num_runs):
                workload = workloads.make(name, run, vocab_size, num_requests)
                idle = meter.wait_idle() if wait else None
                before = meter.cpu_times()
                timed = engine.run(workload)
                cpu = meter.cpu_use(before, meter.cpu_times())
                result.runs.append(record(workload, run, timed, idle, cpu))
            result.peak_rss_mb = meter.peak_rss_mb()
        finally:
            llm.close()
        yield result


def adapter_cache() -> Path:
    """Where random adapters for benchmarks are kept."""
    return cache_dir() / "bench-adapters"


def model_spec(model: str) -> ModelSpec:
    """What a model is made of; its weights are not read."""
    return load_model(model).spec
