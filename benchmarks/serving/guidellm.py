"""guidellm against the server, while our own clients walk away from their answers; then all is level again.

    python3 -m venv VENV && VENV/bin/pip install guidellm
    python -m benchmarks.serving.guidellm VENV/bin/guidellm --out benchmarks/results/serving

guidellm streams completions at several concurrencies, one after the other; all the while other clients
open streams and leave them after some events, or hang up before anything came. guidellm's own report is
kept as `guidellm.json`; `guidellm_level.json` has the state of the server before and after as /metrics and
/proc tell it: requests, pages, memory. An environment of its own, because guidellm brings its own versions
of much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.load import MODEL, versions
from benchmarks.serving.server import ServerProcess
from benchmarks.serving.traffic import WORDS, Traffic, UnexpectedAnswerError
from polybatch.bench import meter, results

NUM_PROMPTS = 400
NUM_LEAVING = 4
WARM_UP_S = 20.0
MAX_GROWTH_MIB = 16.0
"""What the heap of either process may wander by between the two readings."""


def write_prompts(path: Path) -> None:
    """Lines of {"prompt", "output_tokens_count"}."""
    draw = random.Random(11)
    lines = (
        json.dumps(
            {
                "prompt": " ".join(draw.choices(WORDS, k=draw.randint(10, 100))),
                "output_tokens_count": draw.randint(8, 64),
            }
        )
        for _ in range(NUM_PROMPTS)
    )
    path.write_text("\n".join(lines) + "\n")


async def leave(
    url: str, stop: asyncio.Event, num_clients: int = NUM_LEAVING
) -> tuple[Counter[str], list[str]]:
    """Clients that leave early, until told to stop; how many did what, and what went wrong."""
    clients = [Traffic(url, MODEL, [], Path(), seed=100 + i) for i in range(num_clients)]

    async def work(client: Traffic) -> None:
        while not stop.is_set():
            kind = client.random.choice(["left_while_streaming", "left_before_answer"])
            try:
                await getattr(client, kind)()
            except (UnexpectedAnswerError, httpx.HTTPError) as error:
                client.failures.append(f"{kind}: {error}")
            client.num_done[kind] += 1
            await asyncio.sleep(client.random.uniform(0, 0.3))

    await asyncio.gather(*map(work, clients))
    done: Counter[str] = Counter()
    for client in clients:
        done += client.num_done
        await client.http.aclose()
    return done, [failure for client in clients for failure in client.failures]


async def _measure(arguments: argparse.Namespace, server: ServerProcess, folder: Path) -> dict[str, Any]:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(WARM_UP_S, stop.set)
    # As many as there will be at most: what a step needs grows with its rows.
    await leave(server.url, stop, NUM_LEAVING + max(arguments.streams))
    before = await asyncio.to_thread(server.wait_level)
    stop = asyncio.Event()
    leaving = asyncio.create_task(leave(server.url, stop))
    command = [
        str(arguments.guidellm), "run",
        "--backend", f"kind=openai_http,target={server.url},model={MODEL},request_format=/v1/completions",
        "--profile", f'{{"kind": "concurrent", "streams": {arguments.streams}}}',
        "--constraint", f"kind=max_duration,seconds={arguments.seconds}",
        "--data", "kind=json_file,path=prompts.jsonl",
        "--metrics", "kind=generative,sample_size=5",
        "--output", "kind=json,path=report.json", "--output", "kind=console", "--disable-console-interactive",
    ]  # fmt: skip
    started = time.monotonic()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=environment)
    status = await process.wait()
    stop.set()
    left, failures = await leaving
    if status != 0:
        raise subprocess.CalledProcessError(status, command)
    after = await asyncio.to_thread(server.wait_level)
    growth = {name: round(after[name] - before[name], 1) for name in ("front_mib", "engine_mib")}
    return {
        "seconds": round(time.monotonic() - started, 1),
        "left": dict(left),
        "failures": failures,
        "before": before,
        "after": after,
        "growth": growth,
        "is_level": not failures
        and sum(before["pages"].values()) == sum(after["pages"].values())
        and all(mib <= MAX_GROWTH_MIB for mib in growth.values()),
    }


def brief(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of guidellm's report that are quoted: requests, tokens, times in ms."""
    found = []
    for benchmark in report["benchmarks"]:
        metrics = benchmark["metrics"]
        ok = {
            name: metrics[name]["successful"]
            for name in ("time_to_first_token_ms", "time_per_output_token_ms", "output_tokens_per_second")
        }
        found.append(
            {
                "streams": benchmark["config"]["strategy"].get("streams"),
                "requests": metrics["request_totals"],
                "output_tok_s": round(ok["output_tokens_per_second"]["mean"], 1),
                "ttft_ms": {
                    p: round(ok["time_to_first_token_ms"]["percentiles"][p], 1) for p in ("p50", "p95")
                },
                "tpot_ms": {
                    p: round(ok["time_per_output_token_ms"]["percentiles"][p], 1) for p in ("p50", "p95")
                },
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.guidellm", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("guidellm", type=lambda text: Path(text).absolute(), help="the program")
    parser.add_argument("--streams", type=json.loads, default=[1, 8, 32], help="JSON list of concurrencies")
    parser.add_argument("--seconds", type=int, default=40, help="of each")
    parser.add_argument("--out", type=Path, help="folder for the two JSON files")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl")
        flags = [MODEL, "--max-model-len", "512", "--memory", "64MiB", "--log-level", "warning"]
        with ServerProcess(flags, folder / "server.log") as server:
            found = asyncio.run(_measure(arguments, server, folder))
        text = (folder / "report.json").read_text()
    # Paths of this machine say nothing elsewhere.
    report = json.loads(re.sub(rf"{re.escape(name)}/?", "", text))
    content = {
        "command": results.portable_command(["python", "-m", "benchmarks.serving.guidellm", *sys.argv[1:]]),
        "model": MODEL,
        "machine": meter.as_dict(meter.machine()),
        "load_before": load_before,
        "versions": versions(),
        "guidellm": brief(report),
        **found,
    }
    if arguments.out is not None:
        results.write(arguments.out / "guidellm_level.json", content)
        (arguments.out / "guidellm.json").write_text(json.dumps(report) + "\n")
    print(json.dumps({key: content[key] for key in ("guidellm", "left", "failures", "growth", "is_level")}))


if __name__ == "__main__":
    main()
