"""One life of the engine process, as the front sees it: start it, talk to it, watch it, end it.

The socket lies in a folder that only this user may enter, is taken by the one process that was started, and
is gone from the file system once that has connected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from polybatch.engine import messages as ms
from polybatch.errors import ConfigError, EngineError

logger = logging.getLogger("polybatch.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """When the engine process is held to be broken, and how often it is started again; all in seconds.

    heartbeat_s: interval of its sign of life. silence_s: without any message it hangs. stall_s: with work but
    without a finished step it hangs; longer than any step or adapter load. start_s: to load the model.
    stop_s: to end when asked. backoff_s: wait before the first restart, doubled with each up to
    max_backoff_s. max_restarts: in a row; healthy_s of service begin a new row.
    """

    heartbeat_s: float = 1.0
    silence_s: float = 30.0
    stall_s: float = 300.0
    start_s: float = 1800.0
    stop_s: float = 10.0
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    max_restarts: int = 5
    healthy_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "silence_s", "stall_s", "start_s", "stop_s", "healthy_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.silence_s <= 2 * self.heartbeat_s:
            raise ConfigError(
                f"silence_s is {self.silence_s}, heartbeat_s {self.heartbeat_s}; it must be over twice that"
            )


class Connection:
    """A running engine process. `ended` is done, with the reason, once it can serve nothing more."""

    def __init__(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        watch: Watch,
        on_message: Callable[[ms.ToFront], None],
    ) -> None:
        self._process, self._watch = process, watch
        self._reader, self._writer = reader, writer
        self._on_message = on_message
        self._num_messages = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.heartbeat = ms.Heartbeat(0, 0, False)
        self.heard_s = self.progress_s = self.step_s = time.monotonic()

    @classmethod
    async def open(
        cls, start: ms.Start, watch: Watch, on_message: Callable[[ms.ToFront], None]
    ) -> tuple[Connection, ms.Ready]:
        """Start a process and have it load the model.

        on_message: gets whatever it says from then on, except heartbeats. Raises the error that kept it from
        loading: ConfigError, ModelError, AdapterError or EngineError.
        """
        with _socket_folder() as path, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            listener.setblocking(False)
            process = await asyncio.create_subprocess_exec(
                # -P: nothing is imported from whatever folder this was started in.
                sys.executable, "-P", "-m", "polybatch.engine.process", str(path),
                stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            try:
                sock = await _accept(listener, process, watch.start_s)
                reader, writer = await asyncio.open_unix_connection(sock=sock)
            except BaseException:
                await _end(process, 0)
                raise
        connection = cls(process, reader, writer, watch, on_message)
        try:
            ready = await connection._load(start)
        except BaseException:
            await connection.close(is_polite=False)
            raise
        connection._tasks = [
            asyncio.create_task(connection._read()),
            asyncio.create_task(connection._watch_over()),
        ]
        return connection, ready

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ms.ToEngine) -> None:
        """Queue a message; if the process is gone, `ended` tells. Raises EngineError if it is too large."""
        frame = ms.encode(message)
        if not self._writer.is_closing():
            self._writer.write(frame)

    async def close(self, *, is_polite: bool = True) -> None:
        """End the process, by asking first where is_polite. Idempotent."""
        for task in self._tasks:
            task.cancel()
        if is_polite:
            with contextlib.suppress(OSError):
                self.send(ms.Shutdown())
        await _end(self._process, self._watch.stop_s if is_polite else 0)
        self._writer.close()
        self._finish("it was stopped")

    async def _load(self, start: ms.Start) -> ms.Ready:
        self.send(start)
        try:
            async with asyncio.timeout(self._watch.start_s):
                message = await self._receive()
        except TimeoutError:
            raise EngineError(
                f"the engine process did not load the model in {self._watch.start_s} s"
            ) from None
        except (OSError, asyncio.IncompleteReadError):
            raise EngineError(
                f"the engine process ended while it loaded the model: {await _end(self._process, 1)}"
            ) from None
        if isinstance(message, ms.StartFailed):
            raise ms.error_of(message.fault)
        if not isinstance(message, ms.Ready):
            raise EngineError(f"the engine process said {type(message).__name__} before it was ready")
        self.heard_s = self.progress_s = self.step_s = time.monotonic()
        return message

    async def _receive(self) -> ms.ToFront:
        header = await self._reader.readexactly(ms.HEADER_BYTES)
        return ms.decode_to_front(await self._reader.readexactly(ms.frame_size(header)))

    async def _read(self) -> None:
        try:
            while True:
                message = await self._receive()
                self._num_messages += 1
                self.heard_s = time.monotonic()
                if isinstance(message, ms.Heartbeat):
                    self._note(message)
                else:
                    if isinstance(message, ms.Outputs):
                        self.step_s = self.progress_s = self.heard_s
                    self._on_message(message)
        except (OSError, asyncio.IncompleteReadError):
            self._finish(await _end(self._process, 1))
        except EngineError as error:
            self._finish(str(error))

    def _note(self, beat: ms.Heartbeat) -> None:
        if beat.num_steps != self.heartbeat.num_steps:
            self.step_s = self.heard_s
        if not beat.is_busy or beat.num_beats != self.heartbeat.num_beats:
            self.progress_s = self.heard_s
        self.heartbeat = beat

    async def _watch_over(self) -> None:
        """Give the process up when it hangs.

        Silence is counted in rounds of this task, not by the clock: when the front itself was held up, what
        the engine said meanwhile only waits to be read.
        """
        watch = self._watch
        silent, num_messages = 0, self._num_messages
        while not self.ended.done():
            await asyncio.sleep(watch.heartbeat_s)
            silent = silent + 1 if num_messages == self._num_messages else 0
            num_messages = self._num_messages
            if silent * watch.heartbeat_s > watch.silence_s:
                self._finish(f"no sign of life for {watch.silence_s:g} s")
            elif silent == 0 and time.monotonic() - self.progress_s > watch.stall_s:
                self._finish(f"no step finished for {watch.stall_s:g} s")

    def _finish(self, reason: str) -> None:
        if not self.ended.done():
            self.ended.set_result(reason)


@contextlib.contextmanager
def _socket_folder() -> Iterator[Path]:
    """A path for a socket in a new folder that nobody else may enter."""
    folder = tempfile.mkdtemp(prefix="polybatch-")
    try:
        yield Path(folder) / "engine.sock"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _accept(listener: socket.socket, process: Process, timeout_s: float) -> socket.socket:
    """The connection of this very process. Raises EngineError if it ends or takes too long instead."""
    loop = asyncio.get_running_loop()
    exited = asyncio.create_task(process.wait())
    try:
        while True:
            accepting = asyncio.create_task(loop.sock_accept(listener))
            await asyncio.wait((accepting, exited), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                accepting.cancel()
                why = _describe_exit(process.returncode) if exited.done() else "it did not connect in time"
                raise EngineError(f"the engine process could not be started: {why}")
            sock, _ = accepting.result()
            if not hasattr(socket, "SO_PEERCRED") or _peer_pid(sock) == process.pid:
                return sock
            sock.close()
    finally:
        exited.cancel()


def _peer_pid(sock: socket.socket) -> int:
    """Process id at the other end. Source: unix(7), SO_PEERCRED: struct ucred {pid, uid, gid}."""
    size = struct.calcsize("3i")
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
    return pid


async def _end(process: Process, patience_s: float) -> str:
    """Wait for a process to end, then kill it; returns how it ended."""
    try:
        async with asyncio.timeout(patience_s):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.wait()
    return _describe_exit(process.returncode)


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
