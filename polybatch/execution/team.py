"""The worker processes behind rank 0: started, told what happens, watched, ended.

Each is a Python interpreter of its own at the other end of a socket pair, so there is nothing that anybody
else could connect to. Messages are collected and sent when a step is announced. A thread per worker listens;
when one fails, whatever waits for it on a GPU is aborted, and every later call raises its error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from polybatch.errors import EngineError, PolybatchError
from polybatch.execution import parallel_messages as ms

logger = logging.getLogger("polybatch.execution")

START_S = 1800.0
"""To load a part of the model."""

STOP_S = 10.0
"""To end when asked."""

GRACE_S = 2.0
"""From a failed exchange to the reason that the other rank gives for it."""


class _Worker:
    """One process. num_ready: how often it said so."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.num_ready = 0
        self.outbox = bytearray()
        self.sock, theirs = socket.socketpair(socket.AF_UNIX)
        with theirs:
            self.process = subprocess.Popen(
                # -P: nothing is imported from whatever folder this was started in.
                [sys.executable, "-P", "-m", "polybatch.execution.parallel_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=dict(os.environ),
            )  # fmt: skip


class Team:
    """Ranks 1 to size - 1. `store` is a file's path in a private folder, over which the ranks meet."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="polybatch-ranks-")
        self.store = str(Path(self._folder.name) / "store")
        self.size = size
        self.on_failure: Callable[[], None] = lambda: None
        self._changed = threading.Condition()
        self._failure: PolybatchError | None = None
        self._is_closing = False
        self._workers = [_Worker(rank) for rank in range(1, size)]
        for worker in self._workers:
            threading.Thread(target=self._listen, args=(worker,), daemon=True).start()

    @property
    def failure(self) -> PolybatchError | None:
        """Why the ranks can do nothing more together."""
        return self._failure

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self._failure is not None:
            raise self._failure

    def tell(self, message: ms.ToRank, rank: int | None = None) -> None:
        """Have a rank, or all, told in the order of the calls, with the next `flush`."""
        frame = ms.encode(message)
        for worker in self._workers:
            if rank is None or worker.rank == rank:
                worker.outbox += frame

    def flush(self) -> None:
        """Send what was told. Raises the error of a rank that is gone."""
        for worker in self._workers:
            try:
                worker.sock.sendall(worker.outbox)
            except OSError as error:
                self._await(lambda: False, GRACE_S)
                self._fail(EngineError(f"rank {worker.rank} takes no more messages: {error}"))
                self.check()
            worker.outbox.clear()

    def await_ready(self, times: int) -> None:
        """Until every rank has said Ready so often. Raises what keeps one from it."""
        self._await(lambda: all(worker.num_ready >= times for worker in self._workers), START_S)
        self.check()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Around what the ranks do together: raises the error of a rank that failed, not its echo here.

        Errors that Polybatch raises on purpose come before anything was announced and leave all as it is.
        After any other the ranks are no longer in step, and nothing more can be done with them.
        """
        self.check()
        try:
            yield
        except PolybatchError:
            raise
        except BaseException as error:
            if isinstance(error, Exception):
                self._await(lambda: False, GRACE_S)
            failure = self._failure
            self._fail(EngineError(f"rank 0 left a step half done ({error!r}): load the model again"))
            if failure is not None:
                raise failure from error
            raise
        self.check()

    def close(self) -> None:
        """End all processes. Idempotent."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
        for worker in self._workers:
            # One that is gone needs no telling.
            with contextlib.suppress(OSError):
                worker.sock.sendall(ms.encode(ms.Shutdown()))
        deadline = time.monotonic() + (STOP_S if self._failure is None else 0.0)
        for worker in self._workers:
            try:
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            with contextlib.suppress(OSError):
                worker.sock.shutdown(socket.SHUT_RDWR)
            worker.sock.close()
        self._folder.cleanup()

    def _listen(self, worker: _Worker) -> None:
        """Thread: what a worker says, until it ends."""
        error: PolybatchError | None = None
        try:
            while (message := ms.receive_from_rank(worker.sock)) is not None:
                if isinstance(message, ms.Failed):
                    error = ms.error_of(message, worker.rank)
                    break
                with self._changed:
                    worker.num_ready += 1
                    self._changed.notify_all()
        except (OSError, EngineError) as broken:
            logger.debug("rank %d's socket: %s", worker.rank, broken)
        if self._is_closing:
            return
        if error is None:
            status: int | str = "unknown"
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = worker.process.wait(1.0)
            error = EngineError(f"rank {worker.rank} ended with status {status}: see its log for the cause")
        self._fail(error)

    def _fail(self, error: PolybatchError) -> None:
        with self._changed:
            if self._failure is not None or self._is_closing:
                return
            self._failure = error
            self._changed.notify_all()
        logger.error("%s", error)
        self.on_failure()

    def _await(self, is_done: Callable[[], bool], timeout_s: float) -> None:
        """Until something is so, or a rank fails, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or is_done(), timeout_s)
