"""A `polybatch serve` of the benchmark's own: start it, ask it, read what its processes use."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

HOST = "127.0.0.1"
JIFFIES_PER_S = os.sysconf("SC_CLK_TCK")
ENGINE_MODULE = "polybatch.engine.process"

START_S = 180.0
STOP_S = 60.0


class ServerFailedError(Exception):
    """The server did not start, or did not end as it should."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one process: processor seconds so far, memory of its own in MiB, open files, threads.

    Of resident memory without pages of files, which the kernel drops and reads again as it likes.
    """

    processor_s: float
    own_mib: float
    num_files: int
    num_threads: int


def read_process(pid: int) -> Reading:
    """Reads /proc. Raises ServerFailedError if the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{pid}/status").read_text()
        num_files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise ServerFailedError(f"process {pid} is gone: {error}") from error
    kinds = re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status)
    processor_s = (int(fields[11]) + int(fields[12])) / JIFFIES_PER_S
    return Reading(processor_s, sum(map(int, kinds)) / 1024, num_files, int(fields[17]))


def _children(pid: int) -> list[int]:
    listed = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in listed for child in children]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


class ServerProcess:
    """A context manager. arguments: of `polybatch serve`, without host and port. log: its output goes there.
    key: sent as a Bearer token where the server wants one.

    Reads /proc, so it needs Linux.
    """

    def __init__(self, arguments: Sequence[str], log: Path, *, key: str | None = None) -> None:
        self.arguments, self.log = list(arguments), log
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        command = [sys.executable, "-m", "polybatch.cli.main", "serve", *self.arguments]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--port", str(self.port)], stdout=output, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.kill()
                raise ServerFailedError(f"the server did not start: {self.last_words()}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
                raise ServerFailedError(f"the server did not end within {STOP_S:g} s of SIGTERM") from error

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"its log ends with: {' | '.join(lines[-3:])}" if lines else "its log is empty"

    @property
    def other_pids(self) -> list[int]:
        """Of what the HTTP process started besides the engine: the process that tries out forms."""
        engine = self.engine_pid
        return [pid for pid in _children(self.front_pid) if pid != engine]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def front_pid(self) -> int:
        """Of the HTTP process."""
        assert self._process is not None
        return self._process.pid

    @property
    def engine_pid(self) -> int:
        """Of the engine process that serves now. Raises ServerFailedError while there is none."""
        for pid in _children(self.front_pid):
            with contextlib.suppress(OSError):
                if ENGINE_MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        raise ServerFailedError("there is no engine process")

    def get(self, path: str, timeout_s: float = 30.0) -> tuple[int, str]:
        """Status and body."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics by their name with labels, such as `polybatch_pages{kind="kv"}`."""
        status, text = self.get("/metrics")
        if status != http.client.OK:
            raise ServerFailedError(f"/metrics answered with status {status}")
        samples = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def level(self) -> dict[str, Any]:
        """What is to come back to where it was: requests, pages by kind, memory of both processes."""
        metrics = self.metrics()
        return {
            "running": _sum(metrics, "vllm:num_requests_running"),
            "waiting": _sum(metrics, "vllm:num_requests_waiting"),
            "queued": _sum(metrics, "polybatch_queued_completions"),
            "pages": {
                kind: int(metrics[f'polybatch_pages{{kind="{kind}"}}'])
                for kind in ("free", "kv", "cached", "adapter")
            },
            "front_mib": round(read_process(self.front_pid).own_mib, 1),
            "engine_mib": round(read_process(self.engine_pid).own_mib, 1),
        }

    def wait_level(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """The level once nothing runs or waits and no page holds a sequence's KV.

        Raises ServerFailedError, with what is left, if that does not come about in time.
        """
        end = time.monotonic() + timeout_s
        while True:
            level = self.level()
            if not (level["running"] or level["waiting"] or level["queued"] or level["pages"]["kv"]):
                return level
            if time.monotonic() > end:
                raise ServerFailedError(f"{timeout_s:g} s after the last request there is still {level}")
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            return self.get("/ready", timeout_s=5.0)[0] == http.client.OK
        except OSError:
            # Nobody listens yet.
            return False


def _sum(metrics: dict[str, float], name: str) -> int:
    """Of all samples of a name, whatever their labels."""
    return int(sum(value for key, value in metrics.items() if key.partition("{")[0] == name))
