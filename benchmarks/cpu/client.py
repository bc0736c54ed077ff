"""The benchmark's side of a worker process: start it, load an engine, send requests, read its memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polybatch.bench import meter
from polybatch.bench.results import Timed
from polybatch.bench.workloads import BenchRequest, Workload

WORKER = Path(__file__).with_name("worker.py")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


class EngineFailedError(Exception):
    """The engine failed. is_unsupported: it cannot do what was asked, or it is not installed."""

    def __init__(self, message: str, is_unsupported: bool = False) -> None:
        super().__init__(message)
        self.is_unsupported = is_unsupported


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Which engine, how, and with which interpreter.

    name: "kind" or "kind:precision", as given on the command line; a second colon adds a mere label.
    """

    name: str
    python: str
    model: str
    options: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.name.split(":")[0].replace(".", "_").replace("-", "_")

    @property
    def precision(self) -> str:
        return [*self.name.split(":"), ""][1]


class WorkerProcess:
    """One engine in its own process, closed by `close` or at the end of a `with`."""

    def __init__(self, spec: EngineSpec, threads: int, log: Path, timeout_s: float = 1800.0) -> None:
        self.spec, self.threads, self.log, self.timeout_s = spec, threads, log, timeout_s
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **dict.fromkeys(THREAD_VARIABLES, str(threads))}
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [spec.python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, workload: Workload, adapters: dict[str, str]) -> dict[str, Any]:
        """Load the engine with the workload's adapters; gives `version` and `load_s`."""
        config = {
            "model": self.spec.model,
            "precision": self.spec.precision,
            "threads": self.threads,
            "adapters": adapters,
            "ranks": dict(workload.adapters),
            "max_tokens": workload.max_model_len,
            "options": {key: value for key, value in self.spec.options.items() if key != "prime"},
        }
        return self._ask({"op": "load", "kind": self.spec.kind, "config": config})

    def run(self, workload: Workload) -> Timed:
        command = "stream" if workload.is_stream else "batch"
        return self._requests(command, workload.requests)

    def first_token(self, prompt: Sequence[int]) -> tuple[int, float]:
        """The greedy token after a prompt, and the seconds since the process was started."""
        timed = self._requests("stream", [BenchRequest(tuple(prompt), 1)])
        return int(timed.tokens[0][0]), time.perf_counter() - self.started

    def peak_rss_mb(self) -> float | None:
        return meter.peak_rss_mb(self.process.pid)

    def _requests(self, command: str, requests: Sequence[BenchRequest]) -> Timed:
        sent = [
            {"token_ids": list(r.token_ids), "max_tokens": r.max_tokens, "adapter": r.adapter}
            for r in requests
        ]
        prime = self.spec.options.get("prime") == "1"
        answer = self._ask({"op": command, "requests": sent, "prime": prime})
        return Timed(answer["total_s"], answer["tokens"], answer["stamps"])

    def _ask(self, command: dict[str, object]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailedError(f"{self.spec.name} ended; {self._last_words()}") from None
        ready, _, _ = select.select([self.process.stdout], [], [], self.timeout_s)
        if not ready:
            raise EngineFailedError(f"{self.spec.name} gave no answer within {self.timeout_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise EngineFailedError(f"{self.spec.name} ended; {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailedError(answer["error"], answer["unsupported"])
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"last line of its log: {lines[-1]}" if lines else "its log is empty"

    def close(self) -> None:
        """Ask the engine to end, and end it if it does not. Idempotent."""
        if self.process.poll() is None:
            try:
                self._ask({"op": "close"})
                self.process.wait(30)
            except (EngineFailedError, subprocess.TimeoutExpired):
                self.process.kill()
                self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                # A process that is gone leaves what it was sent unread.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
