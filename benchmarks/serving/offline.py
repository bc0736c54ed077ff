"""The engine without a server, in a process of its own, under the same closed loop as the HTTP client.

    python -m benchmarks.serving.offline '{"model": …, "max_model_len": …}'

A line of JSON per run on standard input, `{"concurrency", "is_streamed", "requests": [[token ids, max_tokens,
adapter], …]}`, a line with the figures on standard output.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from benchmarks.serving.client import LoadFailedError
from polybatch.bench.workloads import BenchRequest


class OfflineEngine:
    """The benchmark's side of that process. settings: keyword arguments of `LLM`."""

    def __init__(self, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.offline", json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._read()

    def run(
        self, requests: Sequence[BenchRequest], concurrency: int, *, is_streamed: bool = False
    ) -> dict[str, Any]:
        """total_s, processor_s, num_tokens, ttft_s of every request. is_streamed: text after every step."""
        assert self._process.stdin is not None
        listed = [[r.token_ids, r.max_tokens, r.adapter] for r in requests]
        task = {"concurrency": concurrency, "is_streamed": is_streamed, "requests": listed}
        self._process.stdin.write(json.dumps(task).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise LoadFailedError("the engine without a server ended: see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def _serve(settings: dict[str, Any]) -> None:
    from polybatch import LLM

    with LLM(settings.pop("model"), **settings) as llm:
        print(json.dumps({"is_ready": True}), flush=True)
        for line in sys.stdin:
            print(json.dumps(_replay(llm.core, json.loads(line))), flush=True)


def _replay(core: Any, task: dict[str, Any]) -> dict[str, Any]:
    """Keep so many requests in the engine until all have run."""
    from polybatch import SamplingParams

    todo = iter(enumerate(task["requests"]))
    num_tokens, ttft_s = 0, []
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()

    def submit() -> None:
        following = next(todo, None)
        if following is not None:
            index, (token_ids, max_tokens, adapter) = following
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            core.add_request(f"r{index}", token_ids, params, adapter, stream=task["is_streamed"])

    for _ in range(task["concurrency"]):
        submit()
    while core.has_work():
        for output in core.step():
            if not output.finished:
                continue
            if output.error is not None:
                raise LoadFailedError(f"{output.request_id} failed: {output.error}")
            num_tokens += len(output.outputs[0].token_ids)
            ttft_s.append(output.metrics.first_token_s - output.metrics.arrival_s)
            submit()
    total_s, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    processor_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"total_s": total_s, "processor_s": processor_s, "num_tokens": num_tokens, "ttft_s": ttft_s}


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
