"""Mixed traffic for as long as one likes: nobody hangs, no page stays held, memory stays level.

    python -m benchmarks.serving.soak --seconds 1800 --out benchmarks/results/serving/soak.json

Memory is read every few seconds, for each process without pages of files. The first third warms up: pools,
caches of compiled forms and prefixes fill, allocators find their size. What follows is judged by a robust
line through the readings (Theil 1950, Sen 1968). Allowed is what an allocator's heap wanders by,
`MAX_GROWTH_MIB`, over the judged time: of a quiet engine some megabytes. A leak of 4 KiB per request, a
task or a buffer that is never let go, is more than that after the 6,000 requests that two slow cores
answer in twenty minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.load import versions
from benchmarks.serving.server import Reading, ServerProcess, read_process
from benchmarks.serving.traffic import ADMIN_KEY, API_KEY, Traffic
from polybatch.bench import meter, results

MODEL = "smollm2-135m-instruct"
ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
NAMES = ("sentiment", "sql", "pirate")
SPARE = "json-contact"
NUM_WORKERS = 12
WARM_UP_SHARE = 1 / 3
MAX_GROWTH_MIB = 16.0
MAX_EXTRA_FILES = 20
"""Open files beyond those of the first judged reading: connections kept alive."""


def serve_arguments(data_dir: Path) -> list[str]:
    """A small server, so that every limit is met soon."""
    adapters = [f"--adapter={name}={ADAPTERS / name}" for name in NAMES]
    return [
        MODEL, *adapters, "--max-model-len", "512", "--memory", "64MiB", "--threads", "1",
        "--max-num-seqs", "16",
        "--data-dir", str(data_dir), "--adapter-root", str(ADAPTERS), "--api-key", API_KEY,
        "--admin-api-key", ADMIN_KEY, "--log-level", "warning",
    ]  # fmt: skip


async def _sample(
    server: ServerProcess, started: float, until_s: float, interval_s: float
) -> list[tuple[float, dict[str, Reading]]]:
    """(seconds, readings by process) from time to time."""
    samples = []
    while time.monotonic() < until_s:
        pids = {"front": [server.front_pid], "engine": [server.engine_pid], "forms": server.other_pids}
        readings = {name: read_process(pid) for name, listed in pids.items() for pid in listed[:1]}
        samples.append((time.monotonic() - started, readings))
        await asyncio.sleep(interval_s)
    return samples


async def _run(server: ServerProcess, seconds: float) -> dict[str, Any]:
    started = time.monotonic()
    until_s = started + seconds
    engine_pid = server.engine_pid
    clients = [
        Traffic(server.url, MODEL, list(NAMES), ADAPTERS / SPARE, seed=seed) for seed in range(NUM_WORKERS)
    ]
    async with asyncio.TaskGroup() as group:
        sampling = group.create_task(_sample(server, started, until_s, max(1.0, seconds / 360)))
        for client in clients:
            group.create_task(client.work(until_s))
    for client in clients:
        await client.http.aclose()
    level = await asyncio.to_thread(server.wait_level)
    num_done: Counter[str] = Counter()
    for client in clients:
        num_done += client.num_done
    return {
        "seconds": seconds,
        "num_requests": num_done.total(),
        "num_requests_by_kind": dict(num_done),
        "num_tokens": sum(client.num_tokens for client in clients),
        "longest_wait_s": round(max(client.max_wait_s for client in clients), 1),
        "failures": [failure for client in clients for failure in client.failures],
        "is_same_engine": server.engine_pid == engine_pid,
        "level": level,
        "memory": memory(sampling.result()),
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Median of the slopes between all pairs of points (Theil 1950, Sen 1968)."""
    slopes = [
        (b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(points) for b in points[i + 1 :] if b[0] > a[0]
    ]
    return statistics.median(slopes) if slopes else 0.0


def memory(samples: Sequence[tuple[float, dict[str, Reading]]]) -> dict[str, Any]:
    """By process: growth in the judged time by the robust line, and the curve in MiB."""
    judged_from = samples[-1][0] * WARM_UP_SHARE
    found: dict[str, Any] = {}
    for name in ("front", "engine", "forms"):
        points = [(at, readings[name].own_mib) for at, readings in samples if name in readings]
        files = [
            readings[name].num_files for at, readings in samples if name in readings and at >= judged_from
        ]
        judged = [point for point in points if point[0] >= judged_from]
        if len(judged) < 3:
            continue
        per_s = slope(judged)
        found[name] = {
            "growth_mib": round(per_s * (judged[-1][0] - judged[0][0]), 2),
            "mib_per_hour": round(3600 * per_s, 2),
            "first_mib": round(judged[0][1], 1),
            "last_mib": round(judged[-1][1], 1),
            "files": [files[0], max(files), files[-1]],
            "curve": [[round(at), round(mib, 1)] for at, mib in points],
        }
    return found


def faults(found: dict[str, Any]) -> list[str]:
    """What is not as it should be after a soak; empty if all is well."""
    wrong = list(found["failures"][:20])
    if not found["is_same_engine"]:
        wrong.append("the engine process was restarted")
    if not found["num_requests"]:
        wrong.append("nothing was answered")
    for name, entry in found["memory"].items():
        if entry["growth_mib"] > MAX_GROWTH_MIB:
            wrong.append(f"{name} grew by {entry['growth_mib']} MiB, allowed are {MAX_GROWTH_MIB:g}")
        if entry["files"][-1] > entry["files"][0] + MAX_EXTRA_FILES:
            wrong.append(f"{name} has {entry['files'][-1]} open files, {entry['files'][0]} after warm-up")
    return wrong


def soak(seconds: float, folder: Path) -> dict[str, Any]:
    """Serve and send traffic for some seconds. folder: for the server's log and data.

    Raises ServerFailedError if pages or requests stay behind.
    """
    with ServerProcess(serve_arguments(folder / "data"), folder / "server.log", key=ADMIN_KEY) as server:
        found = asyncio.run(_run(server, seconds))
        pages = found["level"]["pages"]
        found["num_pages"] = sum(pages.values())
    log = (folder / "server.log").read_text(errors="replace")
    found["num_tracebacks"] = log.count("Traceback (most recent call last)")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.soak", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = soak(arguments.seconds, Path(folder))
    found["faults"] = faults(found)
    content = {
        "command": results.portable_command(["python", "-m", "benchmarks.serving.soak", *sys.argv[1:]]),
        "model": MODEL,
        "machine": meter.as_dict(meter.machine()),
        "load_before": load_before,
        "versions": versions(),
        **found,
    }
    if arguments.out is not None:
        results.write(arguments.out, content)
    brief = {key: found[key] for key in ("num_requests", "num_tokens", "longest_wait_s", "level", "faults")}
    print(json.dumps(brief | {"growth_mib": {k: v["growth_mib"] for k, v in found["memory"].items()}}))


if __name__ == "__main__":
    main()
