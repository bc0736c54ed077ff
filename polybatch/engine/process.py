"""The engine process: one interpreter that does nothing but step the engine.

    python -m polybatch.engine.process SOCKET

It connects to the front's Unix socket, is told by `Start` what to load, and then runs the loop: take in what
arrived between two steps, run a step, send what it added. A thread of its own reads the socket, another
sends heartbeats. When the front goes away the process ends.
"""

from __future__ import annotations

import inspect
import logging
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from polybatch.adapters.weights import AdapterWeights
from polybatch.engine import messages as ms
from polybatch.engine.adapter_reader import AdapterReader, ReadsAdapters
from polybatch.engine.core import EngineCore
from polybatch.engine.deltas import DeltaCutter
from polybatch.engine.grammars import WaitingForGrammars
from polybatch.engine.snapshot import take_snapshot
from polybatch.engine.stub import is_stub, stub_core
from polybatch.errors import AdapterError, EngineError, PolybatchError, RequestError
from polybatch.log_format import set_up_logging
from polybatch.request import AdapterRef, Request, RequestOutput

logger = logging.getLogger("polybatch.engine")

MAX_FAILED_STEPS = 3
"""In a row; then the engine is held to be broken, and the process ends to be started afresh."""

ORPHAN_S = 10.0
"""Time that a loop has to notice that the front is gone, before the process ends without it."""

Send = Callable[[ms.ToFront], None]


class AdapterRegistry(ReadsAdapters, Protocol):
    """Adapters that come and go; `polybatch.adapters.store.AdapterStore` is the real one."""

    def add_weights(self, name: str, weights: AdapterWeights) -> AdapterRef: ...

    def remove(self, name: str) -> AdapterRef: ...

    def list(self) -> tuple[AdapterRef, ...]: ...

    def weights(self, digest: str) -> object: ...


@dataclass(slots=True)
class LoadedEngine:
    """An engine ready to run. lost: adapter -> why it was left out."""

    core: EngineCore
    adapters: AdapterRegistry
    lost: dict[str, str]


def load(start: ms.Start) -> LoadedEngine:
    """Load what the front asks for. Raises ConfigError, ModelError or AdapterError."""
    if is_stub(start.model):
        known = inspect.signature(stub_core).parameters
        settings = {name: value for name, value in start.settings.items() if name in known}
        core = stub_core(start.model, start.adapters, **settings)  # type: ignore[arg-type]
        return LoadedEngine(core, core.store, {})  # type: ignore[arg-type]
    from polybatch.engine.llm import LLM

    lost: dict[str, str] = {}
    try:
        llm = LLM(start.model, start.adapters, **start.settings)  # type: ignore[arg-type]
    except AdapterError:
        if not start.is_restart:
            raise
        llm = LLM(start.model, **start.settings)  # type: ignore[arg-type]
        for name, path in start.adapters.items():
            try:
                llm.add_adapter(name, path)
            except AdapterError as error:
                logger.error("adapter %s is lost with the restart: %s", name, error)
                lost[name] = str(error)
    return LoadedEngine(llm.core, llm.core.store, lost)  # type: ignore[arg-type]


class EngineLoop:
    """Steps the engine while there is work, and answers messages in between."""

    def __init__(self, engine: LoadedEngine, inbox: queue.SimpleQueue[ms.ToEngine], send: Send) -> None:
        self._core, self._adapters = engine.core, engine.adapters
        self._inbox, self._send = inbox, send
        self._cutter = DeltaCutter()
        self._num_failed = 0
        self._waiting = WaitingForGrammars(engine.core.door.grammars, inbox)
        self._reader = AdapterReader(engine.adapters, inbox)
        self.num_beats = 0
        self.num_steps = 0
        self.is_busy = False

    def run(self) -> None:
        """Until Shutdown. Raises EngineError when step after step fails."""
        while True:
            self.is_busy = self._core.has_work()
            message = None if self.is_busy else self._inbox.get()
            self.is_busy = True
            while message is not None or not self._inbox.empty():
                message = message or self._inbox.get()
                if isinstance(message, ms.Shutdown):
                    return
                self._answer(message)
                message = None
            if self._core.has_work():
                self._step()
            self.num_beats += 1

    def _answer(self, message: ms.ToEngine) -> None:
        match message:
            case ms.Submit():
                if not self._waiting.holds(message):
                    self._submit(message.request, message.is_streamed)
            case ms.Abort():
                waiting = self._waiting.abort(message.request_id)
                if waiting is not None:
                    self._send(ms.Outputs([waiting]))
                output = self._core.abort(message.request_id)
                if output is not None:
                    self._emit([output])
            case ms.AddAdapter():
                read = self._reader.take(message)
                if read is not None:
                    self._call(
                        message.call_id, lambda: self._adapters.add_weights(message.name, read.result())
                    )
            case ms.RemoveAdapter():
                self._call(message.call_id, lambda: self._adapters.remove(message.name))
            case ms.GetStats():
                self._send(ms.Reply(message.call_id, stats=self._core.stats()))
            case ms.GetSnapshot():
                snapshot = take_snapshot(self._core, message.after_step)
                self._send(ms.Reply(message.call_id, snapshot=snapshot))
            case _:
                raise EngineError(f"the front sent {type(message).__name__} to an engine that runs")

    def _submit(self, request: Request, is_streamed: bool) -> None:
        try:
            self._check_adapter(request)
            self._core.submit(request, stream=is_streamed)
        except PolybatchError as error:
            fault = ms.fault_of(error)
            self._send(ms.Outputs([ms.RequestDelta(request.request_id, [], is_finished=True, fault=fault)]))

    def _check_adapter(self, request: Request) -> None:
        """Raise RequestError if the weights that the front means are not here, as after a restart."""
        if request.adapter is None or request.adapter.parts:
            # A mixture is made of what is here, or refused, when it is submitted.
            return
        try:
            self._adapters.weights(request.adapter.digest)
        except EngineError as error:
            raise RequestError(
                f"adapter {request.adapter.name!r} is not what it was when the request came: send it again",
                field="adapter",
            ) from error

    def _call(self, call_id: int, act: Callable[[], AdapterRef]) -> None:
        try:
            self._send(ms.Reply(call_id, adapter=act()))
        except (PolybatchError, OSError, MemoryError, ValueError, RuntimeError) as error:
            # A folder that cannot be read harms nobody else.
            self._send(ms.Reply(call_id, fault=ms.fault_of(error)))

    def _step(self) -> None:
        try:
            outputs = self._core.step()
            self._num_failed = 0
        except EngineError as error:
            logger.error("%s", error)
            self._num_failed += 1
            self._emit(self._core.drain())
            if self._num_failed >= MAX_FAILED_STEPS:
                raise
            return
        self.num_steps += 1
        self._emit(outputs)

    def _emit(self, outputs: list[RequestOutput]) -> None:
        deltas = [self._cutter.cut(output) for output in outputs]
        if deltas:
            self._send_deltas(deltas)

    def _send_deltas(self, deltas: list[ms.RequestDelta]) -> None:
        """In one message, or in several where one would be too large."""
        try:
            self._send(ms.Outputs(deltas))
        except EngineError as error:
            if len(deltas) > 1:
                middle = len(deltas) // 2
                self._send_deltas(deltas[:middle])
                self._send_deltas(deltas[middle:])
                return
            request_id = deltas[0].request_id
            self._core.abort(request_id)
            self._cutter.forget(request_id)
            fault = ms.fault_of(RequestError(str(error)))
            self._send(ms.Outputs([ms.RequestDelta(request_id, [], is_finished=True, fault=fault)]))


class Link:
    """The socket to the front: frames in, frames out, from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()

    def send(self, message: ms.ToFront) -> None:
        """Blocks while the front is slow. Raises EngineError for a message that is too large."""
        frame = ms.encode(message)
        with self._lock:
            self._sock.sendall(frame)

    def receive(self) -> ms.ToEngine | None:
        """The next message; None where the front has closed."""
        header = self._receive(ms.HEADER_BYTES)
        data = None if header is None else self._receive(ms.frame_size(header))
        return None if data is None else ms.decode_to_engine(data)

    def _receive(self, size: int) -> bytearray | None:
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = self._sock.recv_into(view[filled:])
            if not count:
                return None
            filled += count
        return data


def _read(link: Link, inbox: queue.SimpleQueue[ms.ToEngine]) -> None:
    """Thread: hand messages to the loop; when there is nobody left to serve, see that the process ends."""
    try:
        while (message := link.receive()) is not None:
            inbox.put(message)
    except ConnectionError:
        logger.info("the front's socket was reset")
    finally:
        inbox.put(ms.Shutdown())
        timer = threading.Timer(ORPHAN_S, os._exit, (1,))
        timer.daemon = True
        timer.start()


def _beat(link: Link, loop: EngineLoop, interval_s: float, stop: threading.Event) -> None:
    """Thread: tell the front how far the loop is."""
    while not stop.wait(interval_s):
        try:
            link.send(ms.Heartbeat(loop.num_beats, loop.num_steps, loop.is_busy))
        except OSError:
            return


def serve(link: Link) -> int:
    """Talk to the front until the end; returns the exit status."""
    start = link.receive()
    if not isinstance(start, ms.Start):
        return 1
    set_up_logging(start.log_level, start.log_format)
    try:
        engine = load(start)
    except (PolybatchError, OSError, MemoryError) as error:
        link.send(ms.StartFailed(ms.fault_of(error)))
        return 1
    core = engine.core
    pool = core.executor.pool
    inbox: queue.SimpleQueue[ms.ToEngine] = queue.SimpleQueue()
    loop = EngineLoop(engine, inbox, link.send)
    stop = threading.Event()
    adapters = list(engine.adapters.list())
    link.send(
        ms.Ready(
            core.executor.spec, core.max_model_len, pool.num_pages, pool.page_size, adapters, engine.lost
        )
    )
    threading.Thread(target=_read, args=(link, inbox), daemon=True).start()
    threading.Thread(target=_beat, args=(link, loop, start.heartbeat_s, stop), daemon=True).start()
    try:
        loop.run()
    except EngineError as error:
        logger.critical("the engine process ends: %s", error)
        return 1
    except ConnectionError:
        logger.info("the front is gone")
    finally:
        stop.set()
        core.executor.close()
    return 0


def main() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(sys.argv[1])
        status = serve(Link(sock))
        logging.shutdown()
        # Everything is closed; taking down the interpreter would only take time.
        os._exit(status)


if __name__ == "__main__":
    main()
