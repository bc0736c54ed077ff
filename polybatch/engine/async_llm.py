"""`AsyncLLM`: the engine in a process of its own, called from asyncio.

    async with AsyncLLM("smollm2-135m-instruct", adapters={"sql": "adapters/sql"}) as llm:
        async for delta in llm.generate("How many users?", SamplingParams(max_tokens=32), adapter="sql"):
            print(delta.completions[0].text, end="")

Tokenising and checking happen here, so that an error is immediate and the engine process only steps. When
that process dies or hangs, requests in flight end with `EngineDownError`, and it is started again with its
adapters. Not thread-safe: one event loop owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from polybatch.config import ModelSpec
from polybatch.engine import messages as ms
from polybatch.engine.chat_templates import with_template
from polybatch.engine.connection import Connection, Watch
from polybatch.engine.door import Door
from polybatch.engine.front import AdapterTable, FrontModel, open_front
from polybatch.engine.messages import RequestDelta
from polybatch.engine.observer import Observer
from polybatch.engine.ports import TextTokenizer
from polybatch.engine.request_stream import RequestStream
from polybatch.engine.snapshot import EngineSnapshot
from polybatch.engine.stats import EngineStats
from polybatch.errors import AdapterError, ConfigError, EngineError, RequestError
from polybatch.log_format import current_format
from polybatch.mixture import AdapterChoice
from polybatch.request import (
    AdapterRef,
    Deadlines,
    Request,
    SamplingParams,
    WorkflowStage,
)
from polybatch.structured.checker import GrammarChecker
from polybatch.structured.spec import StructuredSpec
from polybatch.structured.vocabulary import check_constrainable

logger = logging.getLogger("polybatch.engine")

LONG_TEXT_CHARS = 20_000
"""Beyond this a text is tokenised in a thread, so that others are served meanwhile."""

T = TypeVar("T")


class EngineDownError(EngineError):
    """The engine process died, hangs or is being restarted; the same request may succeed later."""


class EngineState(enum.StrEnum):
    """STARTING -> READY <-> RESTARTING; FAILED after too many restarts, CLOSED by `close`."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """How the engine process is. Ages in seconds; num_steps counts since its last start.

    is_ready: it serves, and was heard and made progress within the limits of `Watch`.
    """

    is_ready: bool
    state: EngineState
    reason: str
    num_restarts: int
    num_steps: int
    heartbeat_age_s: float | None
    step_age_s: float | None


class AsyncLLM:
    """A base model with its adapters in a supervised engine process.

    model, adapters, chat_template, settings: as for `LLM`; model may be a stub. watch: when to restart
    the process. Usable after `start`, or as an async context manager.
    """

    def __init__(
        self,
        model: str,
        adapters: Mapping[str, str | Path] | None = None,
        *,
        tokenizer: TextTokenizer | None = None,
        chat_template: str | None = None,
        watch: Watch | None = None,
        **settings: ms.Setting,
    ) -> None:
        self.model, self.settings = model, settings
        self.watch = watch or Watch()
        self.state = EngineState.STARTING
        self.num_restarts = 0
        self.adapter_paths = {name: str(path) for name, path in (adapters or {}).items()}
        self.observer = Observer()
        self._table = AdapterTable()
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._reason = "it is loading the model"
        self._connection: Connection | None = None
        self._streams: dict[str, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[ms.Reply]] = {}
        self._ids = itertools.count()
        self._supervisor: asyncio.Task[None] | None = None
        self._checker: GrammarChecker | None = None
        self._changed = asyncio.Event()
        self._front: FrontModel
        self._ready: ms.Ready
        self._door: Door

    async def start(self) -> None:
        """Start the engine process and load the model.

        Raises ConfigError, ModelError or AdapterError if it cannot be served, EngineError if it dies of it.
        """
        self._front = await asyncio.to_thread(open_front, self.model)
        if self._tokenizer is None:
            self._tokenizer = self._front.tokenizer
        self._tokenizer = with_template(self._tokenizer, self._chat_template)
        await self._open(is_restart=False)
        seed = self.settings.get("seed") or 0
        assert isinstance(seed, int)
        self._door = Door(
            self.spec,
            self.max_model_len,
            self._tokenizer,
            self._table,
            seed,
            is_compiling=False,
            pool_tokens=self._ready.num_pages * self.page_size,
        )
        self._checker = GrammarChecker(self._door.vocabulary)
        self._supervisor = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """End the engine process; requests in flight end with an error. Idempotent."""
        self._set_state(EngineState.CLOSED, "it is shut down")
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self.fail_all("the engine is shut down")
        if self._checker is not None:
            await self._checker.close()
        if self._connection is not None:
            await self._connection.close()

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def spec(self) -> ModelSpec:
        return self._ready.spec

    @property
    def max_model_len(self) -> int:
        """Prompt and output in tokens."""
        return self._ready.max_model_len

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self._ready.page_size

    @property
    def num_pool_tokens(self) -> int:
        """Tokens whose KV the whole pool can hold."""
        return self._ready.num_pages * self._ready.page_size

    @property
    def fingerprint(self) -> str:
        """Hash of the base model's checkpoint."""
        return self._front.fingerprint

    @property
    def tokenizer(self) -> TextTokenizer | None:
        return self._tokenizer

    @property
    def pid(self) -> int | None:
        """Of the engine process that serves now."""
        return None if self._connection is None else self._connection.pid

    @property
    def num_in_flight(self) -> int:
        return len(self._streams)

    def health(self) -> EngineHealth:
        """What is known of the engine process, without asking it."""
        connection, now = self._connection, time.monotonic()
        if self.state is not EngineState.READY or connection is None:
            return EngineHealth(False, self.state, self._reason, self.num_restarts, 0, None, None)
        silence, stall = now - connection.heard_s, now - connection.progress_s
        is_ready = silence <= self.watch.silence_s and stall <= self.watch.stall_s
        return EngineHealth(
            is_ready, self.state, "it serves" if is_ready else "it does not answer", self.num_restarts,
            connection.heartbeat.num_steps, silence, now - connection.step_s,
        )  # fmt: skip

    async def wait_ready(self) -> None:
        """Wait until requests are taken. Raises EngineError if they never will be again."""
        await self._wait_for(EngineState.READY, EngineState.FAILED, EngineState.CLOSED)
        if self.state is not EngineState.READY:
            raise EngineError(f"the engine does not come back: {self._reason}")

    async def wait_failed(self) -> str:
        """Wait until the engine is given up; returns why."""
        await self._wait_for(EngineState.FAILED)
        return self._reason

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises RequestError."""
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer: pass token ids", field="prompt")
        if len(text) <= LONG_TEXT_CHARS:
            return self._tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens)

    async def check_structured(self, spec: StructuredSpec) -> None:
        """Compile what an output must follow, in a process that ends if that takes too long.

        Raises RequestError that says what is wrong with it, BusyError where too many wait.
        """
        check_constrainable(self._tokenizer, self.spec.eos_token_ids)
        assert self._checker is not None
        await self._checker.check(spec)

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        adapter: AdapterChoice = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        num_shared_tokens: int = 0,
        deadlines: Deadlines | None = None,
        workflow: WorkflowStage | None = None,
        expected_tokens: int | None = None,
    ) -> Request:
        """Check a request for `submit`. prompt: token ids. Raises RequestError."""
        return self._door.prepare(
            f"async-{next(self._ids)}" if request_id is None else request_id,
            prompt, params, adapter, priority=priority, cache_salt=cache_salt, tenant=tenant,
            num_shared_tokens=num_shared_tokens, deadlines=deadlines, workflow=workflow,
            expected_tokens=expected_tokens,
        )  # fmt: skip

    def submit(self, request: Request, *, is_streamed: bool = True) -> RequestStream:
        """Hand a request to the engine. is_streamed: deltas step by step, else one at the end.

        Raises RequestError if its id is in use or it is too large, EngineDownError while there is no engine.
        """
        if request.request_id in self._streams:
            raise RequestError(f"request_id {request.request_id!r} is in use", field="request_id")
        connection = self._live_connection()
        try:
            connection.send(ms.Submit(request, is_streamed))
        except EngineError as error:
            raise RequestError(str(error), field="prompt") from error
        stream = RequestStream(request, lambda: self._drop(request.request_id))
        self._streams[request.request_id] = stream
        self.observer.submitted(request)
        return stream

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        adapter: AdapterChoice = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestDelta]:
        """Complete a prompt, yielding what each step adds. Leaving the loop aborts the request.

        Raises RequestError if it is wrong, EngineError if it fails.
        """
        ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        if params is not None and params.structured is not None:
            await self.check_structured(params.structured)
        stream = self.submit(
            self.prepare(
                ids, params, adapter=adapter, request_id=request_id, priority=priority, cache_salt=cache_salt
            )
        )
        try:
            async for delta in stream:
                yield delta
        finally:
            stream.close()

    def abort(self, request_id: str) -> None:
        """End a request; its stream ends with what it has and finish reason "abort". Unknown ids are fine."""
        if request_id in self._streams and self._connection is not None:
            self._connection.send(ms.Abort(request_id))

    def fail_all(self, message: str) -> None:
        """End every request in flight with `EngineDownError`."""
        for stream in list(self._streams.values()):
            self._drop(stream.request.request_id, is_failed=True)
            stream.put(EngineDownError(message))

    async def wait_idle(self) -> None:
        """Wait until nothing is in flight."""
        while self._streams:
            await self._changed.wait()

    @property
    def adapters(self) -> tuple[AdapterRef, ...]:
        """Registered adapters, by name."""
        return self._table.list()

    async def add_adapter(self, name: str, path: str | Path) -> AdapterRef:
        """Register a PEFT directory, also for restarts; a name in use gets the new weights.

        Raises AdapterError, changing nothing, if it cannot be served.
        """
        if not name.strip() or not name.isprintable():
            raise AdapterError(f"adapter name is {name[:80]!r}; it must be printable and not only spaces")
        ref = await self._call(lambda call_id: ms.AddAdapter(call_id, name, str(path)), lambda r: r.adapter)
        self._table.put(ref)
        self.adapter_paths[name] = str(path)
        return ref

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it end undisturbed. Raises RequestError if unknown."""
        self._table.get(name)
        # Gone here first, so that no request for it can be sent after the message.
        self._table.drop(name)
        self.adapter_paths.pop(name, None)
        await self._call(lambda call_id: ms.RemoveAdapter(call_id, name), lambda reply: reply.adapter)

    async def stats(self) -> EngineStats:
        """Counters of the engine process. Raises EngineDownError."""
        return await self._call(ms.GetStats, lambda reply: reply.stats)

    async def snapshot(self, after_step: int = -1) -> EngineSnapshot:
        """The engine at this moment, with its steps after one that is known. Raises EngineDownError."""
        return await self._call(lambda call_id: ms.GetSnapshot(call_id, after_step), lambda r: r.snapshot)

    async def _call(self, make: Callable[[int], ms.ToEngine], pick: Callable[[ms.Reply], T | None]) -> T:
        connection, call_id = self._live_connection(), next(self._ids)
        future: asyncio.Future[ms.Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            connection.send(make(call_id))
            reply = await future
        finally:
            del self._calls[call_id]
        if reply.fault is not None:
            raise ms.error_of(reply.fault)
        found = pick(reply)
        if found is None:
            raise EngineError("the engine process answered with nothing")
        return found

    def _live_connection(self) -> Connection:
        if self._connection is None or self.state is not EngineState.READY:
            raise EngineDownError(f"the engine is {self.state.value}: {self._reason}; try again later")
        return self._connection

    def _drop(self, request_id: str, *, is_failed: bool = False) -> None:
        """Forget a request that nobody listens to any more, and have the engine end it."""
        stream = self._streams.pop(request_id, None)
        if stream is None:
            return
        self.observer.dropped(stream.request, is_failed=is_failed)
        self._note_change()
        if self._connection is not None and self.state is EngineState.READY:
            self._connection.send(ms.Abort(request_id))

    def _receive(self, message: ms.ToFront) -> None:
        if isinstance(message, ms.Outputs):
            for delta in message.deltas:
                stream = self._streams.get(delta.request_id)
                if stream is None:
                    continue
                self.observer.received(stream.request, delta)
                if delta.is_finished:
                    del self._streams[delta.request_id]
                    self._note_change()
                stream.put(delta if delta.fault is None else ms.error_of(delta.fault))
        elif isinstance(message, ms.Reply):
            future = self._calls.get(message.call_id)
            if future is not None and not future.done():
                future.set_result(message)

    async def _open(self, *, is_restart: bool) -> None:
        level = logging.getLogger("polybatch").getEffectiveLevel()
        start = ms.Start(
            self.model, self.adapter_paths, self.settings, self.watch.heartbeat_s, is_restart, level,
            current_format(),
        )  # fmt: skip
        self._connection, self._ready = await Connection.open(start, self.watch, self._receive)
        self._table.replace(self._ready.adapters)
        self._set_state(EngineState.READY, "it serves")

    async def _supervise(self) -> None:
        """Restart the engine process whenever it ends, until it ends too often."""
        num_failures = 0
        while self._connection is not None:
            ready_s = time.monotonic()
            reason = await self._connection.ended
            self._set_state(EngineState.RESTARTING, reason)
            logger.error("the engine process ended: %s; %d requests fail", reason, len(self._streams))
            self._fail(f"the engine process ended while it worked on this ({reason}); it is being restarted")
            await self._connection.close(is_polite=False)
            if time.monotonic() - ready_s > self.watch.healthy_s:
                num_failures = 0
            while self.state is EngineState.RESTARTING:
                if num_failures >= self.watch.max_restarts:
                    self._set_state(EngineState.FAILED, f"{num_failures} restarts failed, last: {reason}")
                    logger.critical("the engine is given up: %s", self._reason)
                    return
                wait_s = min(self.watch.backoff_s * 2**num_failures, self.watch.max_backoff_s)
                num_failures += 1
                await asyncio.sleep(wait_s)
                try:
                    await self._open(is_restart=True)
                    self.num_restarts += 1
                    logger.warning("the engine process was restarted with %d adapters", len(self.adapters))
                except (ConfigError, EngineError, OSError) as error:
                    reason = str(error)
                    logger.error("the engine process could not be restarted: %s", reason)

    def _fail(self, message: str) -> None:
        self.fail_all(message)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDownError(message))

    def _set_state(self, state: EngineState, reason: str) -> None:
        self.state, self._reason = state, reason
        self._note_change()

    def _note_change(self) -> None:
        """Wake whoever waits for a state or for idleness."""
        self._changed.set()
        self._changed.clear()

    async def _wait_for(self, *states: EngineState) -> None:
        while self.state not in states:
            await self._changed.wait()
