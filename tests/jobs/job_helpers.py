"""A small engine without a model, input lines, and a program that a test can kill at any moment."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polybatch.errors import RequestError
from polybatch.jobs.job import open_job
from polybatch.jobs.runner import ModelNames, Runner, Window
from polybatch.request import CompletionOutput, FinishReason, RequestOutput, SamplingParams
from polybatch.scheduling.policies import BATCH_PRIORITY

NAMES = ModelNames(base=("base",), adapters=("a", "b"))
FACTS = {"model": "echo"}
MAX_PROMPT = 1000


class EchoEngine:
    """Answers every prompt with its hash after a number of steps that depends on it, out of order."""

    def __init__(self, max_num_seqs: int = 8, step_s: float = 0.0) -> None:
        self.waiting: dict[str, tuple[list[int], SamplingParams, str | None]] = {}
        self.running: dict[str, int] = {}
        self.max_num_seqs, self.step_s = max_num_seqs, step_s
        self.peak_requests = 0
        self.remembers = True
        self.seeds: dict[str, int | None] = {}
        self.expected: dict[str, int | None] = {}
        self.submitted: list[str] = []

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return list(json.dumps(messages).encode())

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        adapter: str | None,
        *,
        priority: int,
        expected_tokens: int | None,
    ) -> None:
        assert priority == BATCH_PRIORITY
        ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        if len(ids) > MAX_PROMPT:
            raise RequestError(f"prompt has {len(ids)} tokens, max_model_len is {MAX_PROMPT}: shorten it")
        self.waiting[request_id] = (ids, params, adapter)
        if self.remembers:
            self.submitted.append(request_id)
            self.seeds[request_id] = params.seed
            self.expected[request_id] = expected_tokens
        self.peak_requests = max(self.peak_requests, len(self.waiting))

    def has_work(self) -> bool:
        return bool(self.waiting)

    def abort(self, request_id: str) -> None:
        self.waiting.pop(request_id, None)
        self.running.pop(request_id, None)

    def drain(self) -> list[RequestOutput]:
        return []

    def step(self) -> list[RequestOutput]:
        time.sleep(self.step_s)
        for request_id in self.waiting:
            if len(self.running) >= self.max_num_seqs:
                break
            if request_id not in self.running:
                self.running[request_id] = 1 + sum(self.waiting[request_id][0]) % 4
        finished = []
        for request_id in list(self.running):
            self.running[request_id] -= 1
            if not self.running[request_id]:
                del self.running[request_id]
                finished.append(self._finish(request_id))
        return finished

    def _finish(self, request_id: str) -> RequestOutput:
        ids, params, adapter = self.waiting.pop(request_id)
        text = answer(bytes(ids).decode(), adapter)
        error = "page 7 caught fire" if "explode" in bytes(ids).decode() else None
        outputs = [
            CompletionOutput(i, text, list(text.encode()), finish_reason=FinishReason.STOP)
            for i in range(params.n)
        ]
        return RequestOutput(
            request_id, None, ids, [] if error else outputs, num_cached_tokens=1, adapter=adapter, error=error
        )


def answer(prompt: str, adapter: str | None = None) -> str:
    return hashlib.sha256(f"{adapter}:{prompt}".encode()).hexdigest()[:8]


def completion_line(custom_id: str, prompt: object, **fields: Any) -> str:
    body = {"model": "base", "prompt": prompt, **fields}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
    return json.dumps(line) + "\n"


def write_input(path: Path, count: int) -> None:
    with path.open("w") as stream:
        stream.writelines(completion_line(f"row-{i}", f"prompt {i}") for i in range(count))


def run_job(
    source: Path, out: Path, engine: EchoEngine | None = None, *, window: int = 16, **options: Any
) -> Runner:
    """Open a job and run it to its end."""
    facts = options.pop("facts", FACTS)
    job = open_job(source, out, facts, **options)
    try:
        runner = Runner(job, engine or EchoEngine(), NAMES, Window(window))
        assert runner.run()
        return runner
    finally:
        job.close()


def read_output(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert not data or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


if __name__ == "__main__":
    echo = EchoEngine(step_s=float(sys.argv[3]))
    echo.remembers = False
    run_job(Path(sys.argv[1]), Path(sys.argv[2]), echo)
    if len(sys.argv) > 4:
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        Path(sys.argv[4]).write_text(peak.split()[1])
