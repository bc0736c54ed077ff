"""Two GPUs against one: the same logits and tokens, then the time of decode and prefill steps.

    python3 -m benchmarks.cuda.parallel_check [--quick] [--size 2] [--json FILE]

Claim: a model cut over two GPUs computes what it computes on one, with and without adapters of any rank, in
mixed steps, in captured decode steps and a step ahead; its steps are faster than one GPU's. The bound of the
ratio: halved weights and KV, whole vocabulary head on rank 0, and two sums per layer. A check that fails ends
the run, with status 1, before anything is timed. `--device cpu` tries the script itself without a GPU. Every
phase is printed with the seconds since the start; a run that hangs says where, and ends.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if "--device=cpu" in sys.argv or "--device cpu" in " ".join(sys.argv):
    # Decided when kernels are defined, before any of the imports that follow; other ranks inherit it.
    os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.cuda.adapters import RandomAdapters
from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec
from polybatch.execution import team
from polybatch.execution.cuda import CudaExecutor
from polybatch.execution.parallel import ParallelExecutor
from polybatch.kernels import interpret
from polybatch.models.random_weights import open_random
from polybatch.request import AdapterRef, Request, SamplingParams
from polybatch.request import Sequence as Seq
from polybatch.sampling.state import SamplingState
from polybatch.scheduling.plan import PENDING, AdapterLoad, Chunk, LogitRows, StepPlan

SMALL = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "dtype": "bfloat16",
}  # fmt: skip
TINY = SMALL | {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_hidden_layers": 1,
}  # fmt: skip
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of the logits' relative error; two orders of summation at bfloat16 differ by its rounding."""

DEEP_BOUND = 6e-2
"""After 32 layers at bfloat16."""

SILENCE_S = 60.0
"""Without a sign of any rank, after which the run ends."""

TRACE_S = 70.0
"""After which this process says where it stands, again and again."""

BEGAN = time.perf_counter()

GREEDY = SamplingParams(temperature=0.0)


def say(text: str) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.1f} s] {text}", flush=True)


class _Say(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


class Hand:
    """Drives an executor by hand. Pages are never given back."""

    def __init__(self, executor: CudaExecutor) -> None:
        self.executor = executor
        self._next_page = 0
        self._weights: dict[str, AdapterWeights] = {}
        self._resident: dict[str, tuple[int, ...]] = {}

    def take(self, count: int) -> tuple[int, ...]:
        first, self._next_page = self._next_page, self._next_page + count
        if self._next_page > self.executor.pool.num_pages:
            raise SystemExit(f"the check needs more than {self.executor.pool.num_pages} pages")
        return tuple(range(first, self._next_page))

    def sequence(self, length: int, seed: int, adapter: AdapterWeights | None, room: int = 0) -> Seq:
        generator = torch.Generator().manual_seed(seed)
        vocab = self.executor.spec.vocab_size
        tokens = torch.randint(0, vocab, (length,), generator=generator).tolist()
        ref = None
        if adapter is not None:
            self._weights[adapter.digest] = adapter
            ref = AdapterRef(adapter.digest, adapter.digest, self.executor.adapter_pages(adapter))
        seq = Seq(Request("r", tuple(tokens), GREEDY, max_tokens=max(room, 1), seed=0, adapter=ref))
        seq.pages = list(self.take(-(-(length + room) // self.executor.pool.page_size)))
        return seq

    def plan(self, chunks: Sequence[tuple[Seq, int]], rows: LogitRows) -> StepPlan:
        refs = {seq.adapter.digest: seq.adapter for seq, _ in chunks if seq.adapter is not None}
        loads = tuple(
            AdapterLoad(ref, self.take(ref.num_pages))
            for key, ref in refs.items()
            if key not in self._resident
        )
        self._resident |= {load.adapter.digest: load.pages for load in loads}
        made = tuple(Chunk(seq, seq.num_computed, count, rows) for seq, count in chunks)
        for seq, count in chunks:
            seq.num_computed += count
        return StepPlan(made, loads=loads, resident={key: self._resident[key] for key in refs})

    def forward(self, chunks: Sequence[tuple[Seq, int]], rows: LogitRows = LogitRows.LAST) -> torch.Tensor:
        return self.executor.forward(self.plan(chunks, rows), self._weights).to("cpu", copy=True)

    def generate(self, seqs: Sequence[Seq], steps: int) -> tuple[list[list[int]], float]:
        """Greedy tokens, planned a step ahead as the engine does, and the seconds per step."""
        states = [SamplingState(seq) for seq in seqs]
        rows = list(range(len(seqs)))
        sequences: list[list[int]] = [[] for _ in seqs]
        before, started = None, time.perf_counter()
        for _ in range(steps):
            plan = self.plan([(seq, 1) for seq in seqs], LogitRows.LAST)
            launch = self.executor.launch(plan, self._weights, rows, states)
            places = [len(seq.tokens) for seq in seqs]
            for seq in seqs:
                seq.tokens.append(PENDING)
            self._land(seqs, before, sequences)
            before = (launch, places)
        self._land(seqs, before, sequences)
        return sequences, (time.perf_counter() - started) / steps

    def _land(self, seqs: Sequence[Seq], flight: Any, sequences: list[list[int]]) -> None:
        if flight is None:
            return
        launch, places = flight
        for seq, place, token, held in zip(seqs, places, launch.sampled().tokens, sequences, strict=True):
            seq.tokens[place] = token
            held.append(token)

    def release(self, seqs: Sequence[Seq]) -> None:
        for seq in seqs:
            self.executor.release(seq)


def check_adapters(spec: ModelSpec) -> list[AdapterWeights | None]:
    """None, ranks 1, 5, 16 and 64 on all modules, one of them with gains and biases, and 3 on some."""
    generator = torch.Generator().manual_seed(1)

    def adapter(name: str, rank: int, dense: bool, modules: Sequence[str]) -> AdapterWeights:
        def delta(out: int, into: int) -> ModuleDelta:
            a = torch.randn(rank, into, generator=generator) * into**-0.5
            b = torch.randn(rank, out, generator=generator) * rank**-0.5
            gain = 1 + 0.2 * torch.randn(out, generator=generator) if dense else None
            bias = 0.2 * torch.randn(out, generator=generator) if dense else None
            return ModuleDelta(a, b, gain, bias)

        layers = tuple(
            {module: delta(*spec.linear_shapes[module]) for module in modules} for _ in range(spec.num_layers)
        )
        return AdapterWeights(name, layers)

    every = list(spec.linear_shapes)
    some = ["k_proj", "down_proj"]
    return [
        None, adapter("one", 1, False, every), adapter("five", 5, True, every),
        adapter("sixteen", 16, False, every), adapter("large", 64, False, every),
        adapter("some", 3, False, some),
    ]  # fmt: skip


def outputs(executor: CudaExecutor, scale: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits of mixed steps, of decode steps of plain rows and of adapters, and tokens a step ahead."""
    hand, adapters = Hand(executor), check_adapters(executor.spec)
    lengths = [7, 3 * scale, scale + 1, 2 * scale, 5, scale]
    seqs = [hand.sequence(n, n, a, 12) for n, a in zip(lengths, adapters, strict=True)]
    logits = [hand.forward([(seq, len(seq.tokens) // 2) for seq in seqs], LogitRows.ALL)]
    logits.append(hand.forward([(seq, seq.num_uncomputed) for seq in seqs]))
    for part in (seqs, seqs[:1], seqs[1:2] + seqs[3:]):
        for seq in part:
            seq.tokens.append(11)
        logits.append(hand.forward([(seq, 1) for seq in part]))
    for seq in seqs:
        seq.tokens.append(12)
    steady = [seqs[0], seqs[1], seqs[3], seqs[4]]
    tokens, _ = hand.generate(steady, 4)
    hand.release(seqs)
    return logits, tokens


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


Build = Callable[[bool], CudaExecutor]


def step_of(what: str, done: int, total: int) -> None:
    """What one rank's start-up does; several say it themselves."""
    if done in (0, 1, total):
        say(f"{what} {done} of {total}")


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def both(build: Build, work: Callable[[CudaExecutor], Any]) -> tuple[list[Any], list[float]]:
    """What the work gives on one GPU and on several, and the seconds that each took to start."""
    results, starts = [], []
    for is_parallel in (False, True):
        name = "N ranks" if is_parallel else "1 rank"
        say(f"{name}: start")
        began = time.perf_counter()
        executor = build(is_parallel)
        starts.append(round(time.perf_counter() - began, 2))
        say(f"{name}: {executor.describe()['start-up']}; steps")
        try:
            results.append(work(executor))
            say(f"{name}: close")
        finally:
            executor.close()
            del executor
            free()
    return results, starts


def check_small(config: str, dtype: str, make: Callable[..., Build], scale: int) -> dict[str, Any]:
    build = make(config, dtype=dtype, num_pages=1500, max_num_tokens=1024, max_num_seqs=8, max_model_len=1024,
                 max_num_logits=1024)  # fmt: skip
    ((one, one_tokens), (two, two_tokens)), starts = both(build, lambda executor: outputs(executor, scale))
    errors = [relative(b, a) for a, b in zip(one, two, strict=True)]
    same = two_tokens == one_tokens
    is_right = max(errors) < BOUNDS[dtype] and (same or dtype != "float32")
    say(
        f"{dtype}, small: relative errors {[f'{e:.1e}' for e in errors]}, tokens "
        f"{'equal' if same else 'differ'}, started in {starts} s: {'right' if is_right else 'WRONG'}"
    )
    return {"dtype": dtype, "errors": errors, "tokens_equal": same, "is_right": is_right}


def time_steps(executor: CudaExecutor, quick: bool, scale: int) -> dict[str, Any]:
    """Seconds of decode steps at 1 and 64 rows and of prefill steps, plain and with adapters; last logits."""
    hand = Hand(executor)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    random = RandomAdapters(executor.spec, device=where, buffer_bytes=2**28 if quick else 2**30)
    held = [random.make(f"a{i}", 16) for i in range(16 if quick else 64)]
    result: dict[str, Any] = {}
    steps = 2 if where == "cpu" else 16 if quick else 60
    rounds = 1 if quick else 3
    for mix, adapters in (("plain", [None]), ("adapters", held)):
        length = 16 * scale
        whole = [hand.sequence(length, seed, adapters[seed % len(adapters)]) for seed in range(1 + rounds)]
        hand.forward([(whole[0], length)])
        say(f"prefill {length} {mix}")
        began = time.perf_counter()
        for seq in whole[1:]:
            result[f"logits {mix}"] = hand.forward([(seq, length)])
        result[f"prefill {length} {mix}"] = (time.perf_counter() - began) / rounds
        hand.release(whole)
        for batch in (1, 4 if where == "cpu" else 64):
            say(f"decode B={batch} {mix}")
            seqs = [hand.sequence(scale, i, adapters[i % len(adapters)], 2 * steps) for i in range(batch)]
            for seq in seqs:
                seq.num_computed = scale - 1
            hand.generate(seqs, steps // 2)
            result[f"decode B={batch} {mix}"] = hand.generate(seqs, steps)[1]
            hand.release(seqs)
    return result


def time_large(config: str, make: Callable[..., Build], quick: bool, scale: int) -> dict[str, Any]:
    # Triton's interpreter multiplies matrices of bfloat16 as if they were integers.
    dtype, num_pages = ("bfloat16", 14336) if scale > 64 else ("float16", 2000)
    build = make(config, dtype=dtype, num_pages=num_pages,
                 max_num_tokens=16 * scale + 64, max_num_seqs=64, max_model_len=16 * scale + 64)  # fmt: skip
    (one, two), starts = both(build, lambda executor: time_steps(executor, quick, scale))
    figures: dict[str, Any] = {"startup_s": starts}
    print(f"{'step':<28}{'1 GPU ms':>10}{'N GPUs ms':>11}{'ratio':>8}")
    for key, value in one.items():
        if key.startswith("logits"):
            error = relative(two[key], value)
            figures[f"error of {key}"] = error
            print(f"{key:<28}relative error {error:.1e}: {'right' if error < DEEP_BOUND else 'WRONG'}")
            continue
        figures[key] = {"one_ms": 1000 * value, "many_ms": 1000 * two[key], "ratio": value / two[key]}
        print(f"{key:<28}{1000 * value:>10.3f}{1000 * two[key]:>11.3f}{value / two[key]:>8.2f}", flush=True)
    figures["is_right"] = all(v < DEEP_BOUND for k, v in figures.items() if k.startswith("error"))
    say(f"started in {starts} s")
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer adapters and steps")
    parser.add_argument("--size", type=int, default=2, help="GPUs that share the model")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, help="where to put the figures")
    args = parser.parse_args()
    is_cuda = args.device == "cuda"
    faulthandler.dump_traceback_later(TRACE_S if is_cuda else 10 * TRACE_S, repeat=True)
    team.SILENCE_S = SILENCE_S if is_cuda else 10 * SILENCE_S
    logging.basicConfig(handlers=[_Say()])
    logging.getLogger("polybatch.execution").setLevel(logging.DEBUG)
    if is_cuda:
        name, peers = torch.cuda.get_device_name(0), torch.cuda.can_device_access_peer(0, 1)
        say(f"{torch.cuda.device_count()} x {name}, {os.cpu_count()} cores, peer access: {peers}, torch "
            f"{torch.__version__}, NCCL {torch.cuda.nccl.version()}")  # fmt: skip
    # The other ranks import the package from here too, where it is not installed.
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if not is_cuda:
        interpret.prepare()

    def make(config: str, **limits: Any) -> Build:
        draw_on = "cuda" if is_cuda else "cpu"

        def build(is_parallel: bool) -> CudaExecutor:
            weights = open_random(config, device="cuda:0" if is_cuda else "cpu")[0]
            if is_parallel:
                return ParallelExecutor(weights, model=f"random:{config}", size=args.size, device=args.device,
                                        draw_on=draw_on, **limits)  # fmt: skip
            return CudaExecutor(weights, device="cuda:0" if is_cuda else "cpu", progress=step_of, **limits)

        return build

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(SMALL if is_cuda else TINY))
        dtypes = ("float32", "bfloat16") if is_cuda and not args.quick else ("float32",)
        checks = [check_small(str(config), dtype, make, 64 if is_cuda else 4) for dtype in dtypes]
        figures: dict[str, Any] = {"checks": checks}
        is_right = all(check["is_right"] for check in checks)
        if is_right:
            large = "llama-3.1-8b" if is_cuda else str(config)
            figures["steps"] = time_large(large, make, args.quick, 512 if is_cuda else 4)
            is_right = figures["steps"]["is_right"]
    figures["seconds"] = round(time.perf_counter() - BEGAN, 1)
    say("done")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0 if is_right else 1


if __name__ == "__main__":
    try:
        status = main()
    except Exception:  # noqa: BLE001 the process ends whatever it is
        traceback.print_exc()
        status = 1
    # What a rank left on a GPU, or in a library, must not keep the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
