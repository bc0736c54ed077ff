"""First tokens over HTTP with twice as many adapters as the pool holds, against all of them resident.

    python -m benchmarks.serving.adapters_ttft --out benchmarks/results/serving/adapters_ttft.json

Claim: the time to the first token less than doubles. Two servers with the same 16 random adapters of rank
8 on all seven linears: one whose pool holds them all beside the sequences, one whose whole pool is as
large as half of them, sequences included. Requests choose adapters at random, evenly, the worst case for
any cache. They come as a Poisson process at a rate below what either server can do, the same arrivals for
both, in turns; the time is the client's, from sending to the first event. How often an adapter was loaded
is read from /metrics. Servers and client share the machine; pairs from whose sides others took
unequal shares of it do not count where enough are left.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.serving import client
from benchmarks.serving.load import MIN_FAIR_RUNS, MODEL, foreign, is_fair, percentiles, versions
from benchmarks.serving.server import ServerProcess, read_process
from polybatch.bench import meter, results, workloads
from polybatch.bench.random_adapters import write_adapters
from polybatch.bench.runner import adapter_cache, model_spec

NUM_ADAPTERS = 16
MAX_MODEL_LEN = 128
MAX_RATIO = 2.0
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 16
LOADS = "polybatch_adapter_loads_total"
RESIDENT = 'polybatch_adapters{where="resident"}'
ADAPTER_PAGES = 'polybatch_pages{kind="adapter"}'


def arrivals(run: int, count: int, rate: float) -> list[tuple[float, bytes]]:
    """(seconds from the start, request) of a run."""
    draw = random.Random(7000 + run)
    at, found = 0.0, []
    for _ in range(count):
        at += draw.expovariate(rate)
        name = f"r8-{draw.randrange(NUM_ADAPTERS):02d}"
        prompt = [draw.randrange(100, 49000) for _ in range(PROMPT_TOKENS)]
        found.append((at, client.completion(name, prompt, OUTPUT_TOKENS)))
    return found


def num_pages(metrics: dict[str, float]) -> float:
    return sum(value for name, value in metrics.items() if name.startswith("polybatch_pages{"))


def one_run(server: ServerProcess, timed: Sequence[tuple[float, bytes]]) -> dict[str, Any]:
    """One server, one list of arrivals."""
    pids = (server.front_pid, server.engine_pid)
    before, used, cpu = server.metrics(), [read_process(pid).processor_s for pid in pids], meter.cpu_times()
    load = client.replay(server.port, timed)
    own = sum(read_process(pid).processor_s for pid in pids) - sum(used)
    side = {"total_s": load.total_s, "processor_s": {"server": own, "client": load.processor_s}}
    others = foreign(cpu, side)
    after = server.metrics()
    ttft_s = [stream.ttft_s for stream in load.streams]
    return {
        "foreign": others,
        "ttft_ms": percentiles(ttft_s) | {"mean": round(1000 * statistics.fmean(ttft_s), 2)},
        "adapter_loads": int(after[LOADS] - before[LOADS]),
        "resident_at_end": int(after[RESIDENT]),
        "total_s": round(load.total_s, 2),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All runs of both servers."""
    ranks = workloads.make("W4").adapters
    folders = write_adapters(model_spec(MODEL), ranks, adapter_cache())
    flags = [MODEL, *(f"--adapter={name}={path}" for name, path in folders.items())]
    flags += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "32", "--log-level", "warning"]
    # Nobody asks for the same prompt twice here; cached ones would only take the adapters' room.
    flags += ["--no-enable-prefix-caching"]
    warm_up = [(0.05 * i, client.completion(name, [200 + i] * 8, 2)) for i, name in enumerate(folders)]
    with ExitStack() as stack:

        def start(name: str, memory: int) -> ServerProcess:
            log = arguments.logs / f"adapters-{name}.log"
            server = stack.enter_context(ServerProcess([*flags, "--memory", str(memory)], log))
            client.replay(server.port, warm_up)
            return server

        servers = {"resident": start("resident", arguments.memory)}
        metrics = servers["resident"].metrics()
        if metrics[RESIDENT] != len(folders):
            raise client.LoadFailedError(
                f"only {metrics[RESIDENT]:g} of {len(folders)} adapters are resident"
            )
        page_bytes = arguments.memory // int(num_pages(metrics))
        half = int(metrics[ADAPTER_PAGES]) // 2
        servers["twice"] = start("twice", half * page_bytes)
        runs: list[dict[str, Any]] = []
        for turn in range(arguments.runs):
            timed = arrivals(turn, arguments.requests, arguments.rate)
            order = list(servers) if turn % 2 == 0 else list(servers)[::-1]
            run = {name: one_run(servers[name], timed) for name in order}
            runs.append(run)
            print(
                {n: (r["ttft_ms"], r["adapter_loads"], r["resident_at_end"]) for n, r in run.items()},
                file=sys.stderr,
            )
    return {"pool_pages": {"resident": int(num_pages(metrics)), "twice": half}, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.adapters_ttft", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second")
    parser.add_argument("--memory", type=int, default=256 << 20, help="bytes of the pool that holds all")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "polybatch-bench-logs")
    arguments = parser.parse_args()
    found = measure(arguments)
    fair = [run for run in found["runs"] if is_fair(run["resident"], run["twice"])]
    counted = fair if len(fair) >= MIN_FAIR_RUNS else found["runs"]
    medians = {
        name: {
            p: statistics.median(run[name]["ttft_ms"][p] for run in counted)
            for p in ("p50", "p90", "p99", "mean")
        }
        for name in ("resident", "twice")
    }
    ratios = {p: round(medians["twice"][p] / medians["resident"][p], 3) for p in medians["twice"]}
    content = {
        "command": results.portable_command(
            ["python", "-m", "benchmarks.serving.adapters_ttft", *sys.argv[1:]]
        ),
        "model": MODEL,
        "machine": meter.as_dict(meter.machine()),
        "versions": versions(),
        "num_adapters": NUM_ADAPTERS,
        "rate": arguments.rate,
        "num_fair_runs": len(fair),
        "ttft_ms": medians,
        "ratio": ratios,
        "is_met": ratios["p50"] < MAX_RATIO and ratios["mean"] < MAX_RATIO,
        **found,
    }
    if arguments.out is not None:
        results.write(arguments.out, content)
    print(json.dumps({"ttft_ms": medians, "ratio": ratios, "is_met": content["is_met"]}))


if __name__ == "__main__":
    main()
