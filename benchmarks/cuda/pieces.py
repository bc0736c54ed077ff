"""The pieces of the benchmark: each measures some figures on one engine that all of them share.

Outputs must have their forced lengths, or a run does not count (`polybatch.bench.results.record`). Every
workload runs once in full before it is timed, so that whatever is compiled or captured on demand is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch

from benchmarks.cuda import decode_steps, floors, serving, workloads
from benchmarks.cuda.adapters import RandomAdapters
from benchmarks.cuda.figures import Figure
from benchmarks.cuda.floors import Ceilings, Floor
from polybatch.adapters.store import AdapterStore
from polybatch.bench.results import Timed, record
from polybatch.bench.runner import PolybatchEngine
from polybatch.bench.workloads import BenchRequest, Workload
from polybatch.engine.llm import LLM
from polybatch.errors import ConfigError

WARMUP_RUN = 999
DECODE_BATCHES = (1, 32, 64, 128, 256)
ADAPTER_BATCHES = (64, 256)
CLUSTER = 64
ADAPTER_SHARE = 0.9
"""Of the pool, what adapters may fill beside the KV of traffic at a moderate rate."""


@dataclass(slots=True)
class Setup:
    """What a run chose. shrink: divides all sizes, for trials. rates: requests per second of G6's traffic."""

    model: str = "random:llama-3.1-8b"
    device: str = "cuda"
    dtype: str = "bfloat16"
    quantization: str | None = None
    memory: str = "48GiB"
    max_model_len: int = 2304
    max_num_seqs: int = 256
    prefill_tokens: int = 8192
    runs: int = 3
    shrink: int = 1
    rates: tuple[float, ...] = (8.0, 16.0, 40.0)
    ttft_rate: float = 8.0
    traffic_s: float = 20.0
    many_adapters: int = 1000
    few_adapters: int = 64
    options: dict[str, object] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        return self.quantization or self.dtype


class Bench:
    """One engine, loaded when first used, and what the card can do."""

    def __init__(self, setup: Setup, ceilings: Ceilings | None) -> None:
        self.setup, self.ceilings = setup, ceilings
        self._llm: LLM | None = None
        self._adapters: RandomAdapters | None = None
        self._num_traffics = 0
        self.startup: list[Figure] = []

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            s = self.setup
            start = time.perf_counter()
            self._llm = LLM(
                s.model, device=s.device, dtype=s.dtype, quantization=s.quantization, memory=s.memory,
                max_model_len=s.max_model_len, max_num_seqs=s.max_num_seqs,
                max_num_batched_tokens=s.prefill_tokens, **s.options,
            )  # fmt: skip
            loaded_s = time.perf_counter() - start
            self.engine.batch([BenchRequest((1, 2, 3), 1)])
            first_s = time.perf_counter() - start
            # Random weights are drawn tensor by tensor: that is not the engine's time.
            phases = getattr(self._llm.core.executor, "startup_s", {})
            drawn_s = phases.get("weights", 0.0)
            parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())
            note = (
                f"to the first token, without the weights' {drawn_s:.1f} s; {parts}; {loaded_s:.1f} s in all"
            )
            self.startup = [Figure("start-up", round(first_s - drawn_s, 2), "s", note=note)]
        return self._llm

    @property
    def engine(self) -> PolybatchEngine:
        return PolybatchEngine(self.llm)

    def run(self, workload: Workload) -> Timed:
        self.register(workload.adapters)
        return self.engine.batch(workload.requests)

    def register(self, ranks: Mapping[str, int]) -> None:
        if not ranks:
            return
        spec, store = self.llm.spec, self.llm.core.store
        if not isinstance(store, AdapterStore):
            raise ConfigError("this engine was put together without an adapter store")
        if self._adapters is None:
            start = time.perf_counter()
            # The CPU's executor reads host rows as float32; a GPU copies what it serves.
            is_cpu = self.setup.device == "cpu"
            self._adapters = RandomAdapters(
                spec, dtype=torch.float32 if is_cpu else torch.bfloat16, device=self.setup.device,
                buffer_bytes=2**20 if is_cpu else 2**30,
            )  # fmt: skip
            drawn_s = time.perf_counter() - start
            self._adapters.register(store, ranks)
            name = next(iter(ranks))
            self.engine.batch([BenchRequest((1, 2, 3), 1, name)])
            spent = self.startup[0].value + time.perf_counter() - start - drawn_s
            note = f"and {len(ranks)} adapters registered in memory, one of them used"
            self.startup.append(Figure("start-up with adapters", round(spent, 2), "s", note=note))
        self._adapters.register(store, ranks)

    def throughput(self, name: str, unit: str) -> Figure:
        """A workload's tokens per second, or its seconds."""
        setup = self.setup
        vocab_size = self.llm.spec.vocab_size
        self.run(workloads.make(name, WARMUP_RUN, vocab_size, setup.shrink))
        values, runs = [], []
        for run in range(setup.runs):
            workload = workloads.make(name, run, vocab_size, setup.shrink)
            kept = record(workload, run, self.run(workload))
            runs.append(asdict(kept))
            values.append({"out tok/s": kept.out_tok_s, "in tok/s": kept.in_tok_s, "s": kept.total_s}[unit])
        floor, practical = self._limits(workload, unit)
        return Figure(
            name, statistics.median(values), unit, tuple(values), floor, practical,
            details={"runs": runs, "adapters": len(workload.adapters)},
        )  # fmt: skip

    def _limits(self, workload: Workload, unit: str) -> tuple[float | None, float | None]:
        if self.ceilings is None:
            return None, None
        floor = floors.workload_floor(self.llm.spec, self.ceilings, self.setup.precision, workload)
        if unit == "s":
            return _rounded(floor.floor_s), _rounded(floor.practical_s)
        is_out = unit == "out tok/s"
        most = floor.per_s(workload.num_output_tokens if is_out else workload.num_input_tokens)
        return _rounded(most[0]), _rounded(most[1])

    def decode_step(self, batch: int, mix: str | None) -> Figure:
        setup, spec = self.setup, self.llm.spec
        measured = decode_steps.measure(
            self.run, batch, mix, vocab_size=spec.vocab_size, num_pairs=setup.runs, shrink=setup.shrink
        )
        floor = Floor(0.0, None)
        if self.ceilings is not None:
            pair = decode_steps.pair(batch, mix, vocab_size=spec.vocab_size, shrink=setup.shrink)
            floor = floors.decode_floor(spec, self.ceilings, setup.precision, *pair)
        key = f"G2 B={batch}" if mix is None else f"G5-{mix} B={batch}"
        return Figure(
            key, measured.ms, "ms", measured.pairs_ms,
            _rounded(1000 * floor.floor_s) if self.ceilings else None,
            _rounded(None if floor.practical_s is None else 1000 * floor.practical_s),
            details={"pairs_s": measured.runs_s},
        )  # fmt: skip

    def traffic(self, num_adapters: int, rate: float, label: str) -> serving.Served:
        """Traffic over so many adapters, all registered; the first third warms up."""
        setup, duration_s = self.setup, self.setup.traffic_s
        self.register(workloads.traffic_adapters(num_adapters))
        low, high = workloads.TRAFFIC_TOKENS
        self._num_traffics += 1
        arrivals = workloads.traffic(
            num_adapters, rate, duration_s, run=self._num_traffics, vocab_size=self.llm.spec.vocab_size,
            tokens=(max(1, low // setup.shrink), max(2, high // setup.shrink)),
        )  # fmt: skip
        return serving.replay(self.llm.core, arrivals, duration_s, duration_s / 3, label=label)

    def num_fitting_adapters(self) -> int:
        """How many adapters of the traffic's mean size the pool holds beside the KV of its requests."""
        ranks = workloads.traffic_adapters(len(workloads.TRAFFIC_RANKS))
        self.register(ranks)
        store = self.llm.core.store
        assert store is not None
        pages = [store.get(name).num_pages for name in ranks]
        room = ADAPTER_SHARE * self.llm.core.executor.pool.num_pages
        return max(2, int(room / statistics.fmean(pages)))

    def close(self) -> None:
        if self._llm is not None:
            self._llm.close()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def plain(bench: Bench) -> Iterator[Figure]:
    figure = bench.throughput("G1", "out tok/s")
    yield from bench.startup[:1]
    yield figure


def plain_steps(bench: Bench) -> Iterator[Figure]:
    for batch in DECODE_BATCHES:
        if batch <= bench.setup.max_num_seqs:
            yield bench.decode_step(batch, None)


def prefill(bench: Bench) -> Iterator[Figure]:
    yield bench.throughput("G3", "in tok/s")


def shared_prefix(bench: Bench) -> Iterator[Figure]:
    yield bench.throughput("G4", "s")


def adapters(bench: Bench) -> Iterator[Figure]:
    """All mixes, and the plain workload once more beside them, so that ratios are of one spell."""
    bench.register(workloads.make("G5-64").adapters)
    yield from bench.startup
    yield replace(
        bench.throughput("G1", "out tok/s"), key="G5 plain", note="G1 again, 64 adapters registered"
    )
    for mix in workloads.MIXES:
        yield bench.throughput(f"G5-{mix}", "out tok/s")


def adapter_steps(bench: Bench) -> Iterator[Figure]:
    for mix in ("64", "64zipf", "1", "half"):
        for batch in ADAPTER_BATCHES:
            if batch <= bench.setup.max_num_seqs:
                yield bench.decode_step(batch, mix)


def many_adapters(bench: Bench) -> Iterator[Figure]:
    """Throughput under a rate sweep with few and with many adapters registered."""
    setup = bench.setup
    for num_adapters in (setup.few_adapters, setup.many_adapters):
        sweep = {}
        for rate in setup.rates:
            label = f"{num_adapters} adapters at {rate:g}/s"
            sweep[f"{rate:g}"] = bench.traffic(num_adapters, rate, label)
        note = (
            "ranks 64, 32, 16, 8 in turn, uniform popularity; adapters share a buffer in host memory, loads "
            "move all their bytes"
        )
        yield _best_of(f"G6 {num_adapters} adapters", sweep, note)


def clustered_adapters(bench: Bench) -> Iterator[Figure]:
    """The many adapters again where, once CLUSTER distinct ones run, requests for one of them go first."""
    setup = bench.setup
    cluster = max(1, CLUSTER // setup.shrink)
    clustered = Bench(replace(setup, options={**setup.options, "adapter_cluster": cluster}), bench.ceilings)
    sweep = {f"{rate:g}": clustered.traffic(setup.many_adapters, rate, f"clustered at {rate:g}/s")
             for rate in setup.rates}  # fmt: skip
    key = f"G6 {setup.many_adapters} adapters, clustered"
    yield _best_of(key, sweep, f"as above, --adapter-cluster {cluster}")


def _best_of(key: str, sweep: Mapping[str, serving.Served], note: str) -> Figure:
    """The highest throughput of a rate sweep, and whether the working set was saturated then."""
    rate, best = max(sweep.items(), key=lambda item: item[1].out_tok_s)
    queued = "no" if best.queued_from_s is None else f"from {best.queued_from_s:.0f} s on always a"
    note = (
        f"best of the rate sweep, {rate} requests/s: {queued} queue, {best.window_s:.0f} s counted, on the "
        f"average {best.adapters:.0f} adapters in {best.rows:.0f} rows; {note}"
    )
    details = {name: asdict(served) for name, served in sweep.items()}
    return Figure(key, best.out_tok_s, "out tok/s", note=note, details=details)


def many_adapters_ttft(bench: Bench) -> Iterator[Figure]:
    """First tokens with half as many adapters as fit in the pool, and with twice as many."""
    setup, fit = bench.setup, bench.num_fitting_adapters()
    for key, num_adapters in (("all resident", max(1, fit // 2)), ("twice what fits", 2 * fit)):
        # Every adapter is used once before, so that those that fit are there.
        names = workloads.traffic_adapters(num_adapters)
        bench.register(names)
        bench.engine.batch([BenchRequest((1, 2, 3), 1, name) for name in names])
        served = bench.traffic(num_adapters, setup.ttft_rate, f"TTFT over {num_adapters} adapters")
        note = f"mean, {num_adapters} adapters where {fit} fit beside the KV, {setup.ttft_rate:g} requests/s"
        yield Figure(f"G6 TTFT, {key}", served.ttft_mean_ms, "ms", note=note, details=asdict(served))


PIECES: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "G1": plain,
    "G2": plain_steps,
    "G3": prefill,
    "G4": shared_prefix,
    "G5": adapters,
    "G5steps": adapter_steps,
    "G6": many_adapters,
    "G6cluster": clustered_adapters,
    "G6ttft": many_adapters_ttft,
}
