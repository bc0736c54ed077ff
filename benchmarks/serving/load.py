"""What a server costs beside the engine alone: streams over HTTP against the same requests in process.

    python -m benchmarks.serving.load --out benchmarks/results/serving/load.json

Claim: at 32 streams at once, at most a tenth of the engine's throughput is lost to HTTP, streaming and the
way between the processes. Both sides keep so many requests under way until all have run: greedy, lengths
forced, the token ids of the offline batch W2, the same for both and new in every run. They take turns, and
whoever begins changes. The engine alone makes its text once at the end, as offline batches do; with
`--streamed` it is measured a third time with text after every step, which tells streaming from HTTP.

Server, engine and client share the machine's cores. The client's processor time is given apart: on a
machine of its own it would not be in the server's way, so the loss measured here is an upper limit.

Other work on the machine falsifies times: what of its processors others used during a run is recorded, and
medians are over the pairs in which that was much the same on both sides, where there are enough of them. The
ratio of processor times, which hardly depends on it, is given beside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.serving import client
from benchmarks.serving.offline import OfflineEngine
from benchmarks.serving.server import ServerProcess, read_process
from polybatch.bench import meter, results, workloads
from polybatch.bench.workloads import BenchRequest

MODEL = "smollm2-135m-instruct"
MAX_MODEL_LEN = 512
MAX_LOSS = 0.10
BAR_CONCURRENCY = 32
MAX_UNFAIRNESS = 0.04
"""By how much others' share of the processors may differ between the two sides of a pair that counts."""

MIN_FAIR_RUNS = 3
NUM_REQUESTS = {1: 6, 8: 32, 32: 96, 128: 256}
PACKAGES = ("polybatch", "torch", "uvicorn", "uvloop", "httptools", "fastapi", "starlette", "msgspec")


def versions() -> dict[str, str]:
    """Of what a server's speed depends on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds, in ms."""
    ordered = sorted(1000 * value for value in values)
    if not ordered:
        return {}
    return {
        f"p{p}": round(ordered[min(len(ordered) - 1, p * len(ordered) // 100)], 2) for p in (50, 90, 95, 99)
    }


def over_http(server: ServerProcess, requests: Sequence[BenchRequest], concurrency: int) -> dict[str, Any]:
    """One run of the server."""
    sent = [client.completion(MODEL, r.token_ids, r.max_tokens) for r in requests]
    pids = {"front": server.front_pid, "engine": server.engine_pid}
    before = {name: read_process(pid).processor_s for name, pid in pids.items()}
    load = client.run(server.port, sent, concurrency)
    used = {name: read_process(pid).processor_s - before[name] for name, pid in pids.items()}
    streams = load.streams
    return {
        "total_s": load.total_s,
        "num_tokens": load.num_tokens,
        "processor_s": used | {"client": load.processor_s},
        "ttft_ms": percentiles([stream.ttft_s for stream in streams]),
        "tpot_ms": percentiles([tpot for stream in streams if (tpot := stream.tpot_s) is not None]),
        "gap_ms": percentiles([gap for stream in streams for gap in stream.gaps_s()]),
    }


def in_process(
    engine: OfflineEngine, requests: Sequence[BenchRequest], concurrency: int, *, is_streamed: bool = False
) -> dict[str, Any]:
    """One run of the engine alone."""
    found = engine.run(requests, concurrency, is_streamed=is_streamed)
    found["ttft_ms"] = percentiles(found.pop("ttft_s"))
    return found | {"processor_s": {"engine": found["processor_s"]}}


Side = Callable[[Sequence[BenchRequest], int], dict[str, Any]]


def measure(arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Runs by concurrency, each with all sides."""
    settings: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "memory": arguments.memory}
    flags = ["--max-model-len", str(MAX_MODEL_LEN), "--memory", arguments.memory, "--log-level", "warning"]
    if arguments.threads is not None:
        settings["threads"] = arguments.threads
        flags += ["--threads", str(arguments.threads)]
    found: dict[str, list[dict[str, Any]]] = {}
    with (
        OfflineEngine(model=MODEL, **settings) as engine,
        ServerProcess([MODEL, *flags], arguments.logs / "load.log") as server,
    ):
        sides: dict[str, Side] = {
            "http": lambda r, c: over_http(server, r, c),
            "offline": lambda r, c: in_process(engine, r, c),
        }
        if arguments.streamed:
            sides["streamed"] = lambda r, c: in_process(engine, r, c, is_streamed=True)
        for side in sides.values():
            side(workloads.make("W2", 999, num_requests=16).requests, 16)
        for turn in range(arguments.runs):
            for index, concurrency in enumerate(arguments.concurrency):
                count = max(
                    concurrency, round(arguments.share * NUM_REQUESTS.get(concurrency, 2 * concurrency))
                )
                requests = workloads.make("W2", 100 * index + turn, num_requests=count).requests
                # The engine alone keeps the prefixes of its first turn: the second gets others as long.
                others = workloads.make("W2", 100 * index + turn + 50, num_requests=count).requests
                order = list(sides) if turn % 2 == 0 else list(sides)[::-1]
                run: dict[str, Any] = {"load_before": os.getloadavg()[0]}
                for name in order:
                    if arguments.wait_s:
                        meter.wait_idle(window_s=1.0, timeout_s=arguments.wait_s)
                    before = meter.cpu_times()
                    run[name] = sides[name](others if name == "streamed" else requests, concurrency)
                    run[name]["foreign"] = foreign(before, run[name])
                    if run[name]["num_tokens"] != sum(r.max_tokens for r in requests):
                        raise client.LoadFailedError(f"{name} gave {run[name]['num_tokens']} tokens")
                run["ratio"] = run["offline"]["total_s"] / run["http"]["total_s"]
                found.setdefault(str(concurrency), []).append(run)
                print(f"{concurrency:4} {describe(run)}", file=sys.stderr)
    return found


def foreign(before: meter.CpuTimes | None, side: dict[str, Any]) -> float | None:
    """Share of all processors that others used during a run."""
    use = meter.cpu_use(before, meter.cpu_times())
    if use is None:
        return None
    own: float = sum(side["processor_s"].values()) / (side["total_s"] * (os.cpu_count() or 1))
    return round(max(0.0, use.busy - own), 4)


def is_fair(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether others took about as much of the machine, at best nothing, from both sides of a pair."""
    difference: float = abs((first["foreign"] or 0.0) - (second["foreign"] or 0.0))
    return difference <= MAX_UNFAIRNESS


def describe(run: dict[str, Any]) -> str:
    """One run in a line."""
    http = run["http"]
    used = ", ".join(
        f"{name} {1e6 * seconds / http['num_tokens']:.0f}" for name, seconds in http["processor_s"].items()
    )
    alone = 1e6 * run["offline"]["processor_s"]["engine"] / http["num_tokens"]
    speeds = " ".join(
        f"{name} {run[name]['num_tokens'] / run[name]['total_s']:.0f}"
        for name in ("http", "offline", "streamed") if name in run
    )  # fmt: skip
    others = ", ".join(f"{name} {run[name]['foreign']}" for name in ("http", "offline"))
    return (
        f"{run['ratio']:.3f} tok/s {speeds}; µs/token of processor: {used}, offline {alone:.0f}; "
        f"others' share: {others}"
    )


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one concurrency; overheads in µs per output token.

    processor_ratio: processor time of the engine alone over that of front and engine.
    """
    fair = [run for run in runs if is_fair(run["http"], run["offline"])]
    num_runs = len(runs)
    if len(fair) >= MIN_FAIR_RUNS:
        runs = fair

    def median(*path: str) -> float:
        return statistics.median(_at(run, path) for run in runs)

    tokens = runs[0]["http"]["num_tokens"]
    micro = 1e6 / tokens
    sides = [side for side in ("http", "offline", "streamed") if side in runs[0]]
    return {
        "num_tokens": tokens,
        "num_runs": num_runs,
        "num_fair_runs": len(fair),
        "foreign": round(statistics.median(run["http"]["foreign"] or 0.0 for run in runs), 4),
        "tok_s": {side: round(tokens / median(side, "total_s"), 1) for side in sides},
        "ratio": round(statistics.median(run["ratio"] for run in runs), 4),
        "ratio_range": [round(pick(run["ratio"] for run in runs), 4) for pick in (min, max)],
        "processor_ratio": round(statistics.median(map(processor_ratio, runs)), 4),
        "overhead_us": round(
            statistics.median((r["http"]["total_s"] - r["offline"]["total_s"]) * micro for r in runs), 1
        ),
        "processor_us": {
            name: round(median("http", "processor_s", name) * micro, 1)
            for name in ("front", "engine", "client")
        }
        | {"offline": round(median("offline", "processor_s", "engine") * micro, 1)},
        **{
            kind: {p: round(median("http", kind, p), 2) for p in ("p50", "p90", "p99")}
            for kind in ("ttft_ms", "tpot_ms", "gap_ms")
        },
        "offline_ttft_ms": {p: round(median("offline", "ttft_ms", p), 2) for p in ("p50", "p90", "p99")},
    }


def processor_ratio(run: dict[str, Any]) -> float:
    used = run["http"]["processor_s"]
    return float(run["offline"]["processor_s"]["engine"] / (used["front"] + used["engine"]))


def _at(value: Any, path: Sequence[str]) -> float:
    for key in path:
        value = value[key]
    return float(value)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.load", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--concurrency", type=lambda v: [int(x) for x in v.split(",")], default=[1, 8, 32, 128]
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the requests, for trials")
    parser.add_argument("--streamed", action="store_true", help="also the engine alone, streaming")
    parser.add_argument("--threads", type=int, help="of both engines; default one per processor")
    parser.add_argument("--memory", default="512MiB", help="of both page pools")
    parser.add_argument("--wait-s", type=float, default=0.0, help="at most, for an idle machine before a run")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "polybatch-bench-logs")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    before = meter.cpu_times()
    runs = measure(arguments)
    by_concurrency = {concurrency: summary(listed) for concurrency, listed in runs.items()}
    bar = by_concurrency.get(str(BAR_CONCURRENCY))
    content = {
        "command": results.portable_command(["python", "-m", "benchmarks.serving.load", *sys.argv[1:]]),
        "model": MODEL,
        "machine": meter.as_dict(meter.machine()),
        "use": meter.as_dict(meter.cpu_use(before, meter.cpu_times())),
        "versions": versions(),
        "summary": by_concurrency,
        "is_met": None if bar is None else 1 - bar["ratio"] <= MAX_LOSS,
        "runs": runs,
    }
    if arguments.out is not None:
        results.write(arguments.out, content)
    print(
        json.dumps({"ratio": {c: s["ratio"] for c, s in by_concurrency.items()}, "is_met": content["is_met"]})
    )


if __name__ == "__main__":
    main()
