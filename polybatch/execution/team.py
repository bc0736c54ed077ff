"""The worker processes behind rank 0: started, told what happens, watched, ended.

Each is a Python interpreter of its own at the other end of a socket pair, so there is nothing that anybody
else could connect to. Messages are collected and sent when a step is announced. A thread per worker listens;
when one fails, whatever waits for it on a GPU is aborted, and every later call raises its error. So it does
when no rank gets on: in start-up, or in a step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from polybatch.errors import EngineError, PolybatchError
from polybatch.execution import parallel_messages as ms

logger = logging.getLogger("polybatch.execution")

T = TypeVar("T")

SILENCE_S = 120.0
"""Without a sign of any rank in start-up, where layers and graphs are told one by one; for a step to end."""

POLL_S = 20e-6
"""Between looks at a step that other ranks take part in."""

TRACE_S = 0.5
"""For ranks to write where their threads stand."""

STOP_S = 10.0
"""To end when asked."""

GRACE_S = 2.0
"""From a failed exchange to the reason that the other rank gives for it."""


class _Worker:
    """One process. phase: what it said last; reached: all that it said."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.phase = ms.STARTING
        self.reached = {ms.STARTING}
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
        self._phase, self._heard, self._is_started = ms.STARTING, time.monotonic(), False
        self._workers = [_Worker(rank) for rank in range(1, size)]
        for worker in self._workers:
            threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        threading.Thread(target=self._watch_start, daemon=True).start()

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

    def enter(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Say what rank 0 does in start-up, which then has time again."""
        self._note(0, ms.Phase(phase, done, total))

    def await_phase(self, phase: str) -> None:
        """Until every other rank has reached a phase. Raises what keeps one from it."""
        self._await(lambda: all(phase in worker.reached for worker in self._workers))
        self.check()

    def run(self, work: Callable[[], T]) -> T:
        """What may never return, in a thread of its own. Raises its error, or the failure of a rank."""
        future: Future[T] = Future()

        def target() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 the caller raises whatever it is
                future.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        threading.Thread(target=target, daemon=True).start()
        self._await(future.done)
        if not future.done():
            self.check()
        return future.result()

    def started(self) -> None:
        """All ranks take part in steps from now on."""
        self.await_phase(ms.FOLLOWING)
        with self._changed:
            self._is_started = True
            self._changed.notify_all()

    def wait(self, is_done: Callable[[], bool], what: str) -> None:
        """Look again and again whether a step has ended. what: the error if it does not."""
        deadline = time.monotonic() + SILENCE_S
        while not is_done() and self._failure is None:
            time.sleep(POLL_S)
            if time.monotonic() > deadline:
                self.give_up(what)
        self.check()

    def give_up(self, where: str) -> None:
        """Fail because ranks got no further, with where their threads stand on stderr."""
        for worker in self._workers:
            if worker.process.poll() is None and ms.OPENING in worker.reached:
                worker.process.send_signal(signal.SIGUSR1)
        time.sleep(TRACE_S)
        self._fail(EngineError(f"no rank got on for {SILENCE_S:g} s: {where}; see the log for their stacks"))

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
        """End all processes and forget where they met. Idempotent."""
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """End all processes. Idempotent."""
        with self._changed:
            if self._is_closing:
                return
            self._is_closing = True
            self._changed.notify_all()
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

    def _listen(self, worker: _Worker) -> None:
        """Thread: what a worker says, until it ends."""
        error: PolybatchError | None = None
        try:
            while (message := ms.receive_from_rank(worker.sock)) is not None:
                if isinstance(message, ms.Failed):
                    error = ms.error_of(message, worker.rank)
                    break
                self._note(worker.rank, message)
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

    def _note(self, rank: int, phase: ms.Phase) -> None:
        part = f" {phase.done} of {phase.total}" if phase.total else ""
        with self._changed:
            self._heard = time.monotonic()
            if rank:
                worker = self._workers[rank - 1]
                worker.phase = phase.name + part
                worker.reached.add(phase.name)
            else:
                self._phase = phase.name + part
            self._changed.notify_all()
        logger.debug("rank %d: %s%s", rank, phase.name, part)

    def _watch_start(self) -> None:
        """Thread: end a start-up in which no rank gets on."""

        def is_over() -> bool:
            return self._failure is not None or self._is_started or self._is_closing

        with self._changed:
            while not is_over() and (left := self._heard + SILENCE_S - time.monotonic()) > 0:
                self._changed.wait(left)
            if is_over():
                return
            phases = [(0, self._phase), *((worker.rank, worker.phase) for worker in self._workers)]
        self.give_up("start-up ends while " + ", ".join(f"of rank {rank} {phase}" for rank, phase in phases))

    def _fail(self, error: PolybatchError) -> None:
        with self._changed:
            if self._failure is not None or self._is_closing:
                return
            self._failure = error
            self._changed.notify_all()
        logger.error("%s", error)
        self.on_failure()

    def _await(self, is_done: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Until something is so, or a rank fails, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or is_done(), timeout_s)
