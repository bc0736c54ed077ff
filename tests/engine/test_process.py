"""The engine process: what travels, what happens when it dies or hangs, what is left behind."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import stat
import tempfile
import threading
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from engine_helpers import make_core, run
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.adapters.weights import AdapterWeights
from polybatch.engine import messages as ms
from polybatch.engine.async_llm import AsyncLLM, EngineDownError, EngineState
from polybatch.engine.connection import Watch
from polybatch.engine.deltas import DeltaCutter, OutputCollector
from polybatch.engine.process import EngineLoop, LoadedEngine
from polybatch.engine.stub import stub_core
from polybatch.errors import AdapterError, ConfigError, EngineError, RequestError
from polybatch.execution.fake import FakeExecutor
from polybatch.request import AdapterRef, FinishReason, Request, RequestOutput, SamplingParams
from polybatch.scheduling.plan import StepPlan

FAST = Watch(heartbeat_s=0.05, silence_s=1.0, stall_s=30.0, backoff_s=0.02, stop_s=5.0)
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


def run_async(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def llm(model: str = "stub", watch: Watch = FAST, **settings: Any) -> AsyncLLM:
    return AsyncLLM(model, {"red": "red"}, watch=watch, **({"max_model_len": 1000} | settings))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop that `shared` lives in."""
    with asyncio.Runner() as loop:
        yield loop


@pytest.fixture(scope="module")
def shared(runner: asyncio.Runner) -> Iterator[AsyncLLM]:
    """An engine process for tests that leave it as it was."""
    engine = llm("stub:step_s=0.005,num_pages=64", max_model_len=2000)
    runner.run(engine.start())
    yield engine
    runner.run(engine.close())


def test_a_request_arrives_as_it_was_sent() -> None:
    params = SamplingParams(n=2, stop=["a", "b"], logit_bias={3: -1.5}, seed=2**64 - 1, logprobs=3)
    request = Request("r", (1, 2), params, 7, 2**64 - 1, frozenset((4, 5)), adapter=AdapterRef("n", "d", 3),
                      priority=-2, arrival_s=1.5, cache_salt="s")  # fmt: skip
    frame = ms.encode(ms.Submit(request, True))
    assert ms.frame_size(frame[: ms.HEADER_BYTES]) == len(frame) - ms.HEADER_BYTES
    assert ms.decode_to_engine(frame[ms.HEADER_BYTES :]) == ms.Submit(request, True)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"\xff" * 50, msgspec.msgpack.encode(["Submit"]), msgspec.msgpack.encode(["Nothing", 1]),
     msgspec.msgpack.encode({"type": "Abort"}), ms.encode(ms.Heartbeat(1, 2, True))[4:]],
)  # fmt: skip
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(EngineError, match="no message"):
        ms.decode_to_engine(data)


def test_frames_have_a_largest_size() -> None:
    with pytest.raises(EngineError, match="announced"):
        ms.frame_size(b"\xff\xff\xff\xff")
    with pytest.raises(EngineError, match="bytes"):
        ms.encode(ms.Abort("x" * (ms.MAX_FRAME_BYTES + 1)))


@pytest.mark.parametrize(
    "error", [RequestError("a", "n"), ConfigError("b"), AdapterError("c"), EngineError("d")]
)
def test_an_error_arrives_as_what_it_was(error: Exception) -> None:
    found = ms.error_of(ms.fault_of(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert getattr(found, "field", None) == getattr(error, "field", None)
    assert isinstance(ms.error_of(ms.fault_of(KeyError("x"))), EngineError)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 3),
    logprobs=st.sampled_from([None, 2]),
    seed=st.integers(0, 99),
    is_stopped=st.booleans(),
)
def test_deltas_put_together_are_the_output(
    n: int, logprobs: int | None, seed: int, is_stopped: bool
) -> None:
    params = SamplingParams(
        n=n,
        logprobs=logprobs,
        prompt_logprobs=logprobs,
        seed=seed,
        max_tokens=20,
        stop=["a"] if is_stopped else [],
    )
    core, cutter = make_core(), DeltaCutter()
    request = core.door.prepare("r", "héllo", params)
    core.submit(request, stream=True)
    collector = OutputCollector(request, "héllo")
    num_texts = 0
    last: RequestOutput | None = None
    while core.has_work():
        for output in core.step():
            delta = cutter.cut(output)
            num_texts += sum(len(change.text) for change in delta.completions)
            collector.add(delta)
            last = output
    assert last is not None
    assert collector.output() == last
    assert num_texts == sum(len(completion.text) for completion in last.outputs)


class FailingExecutor(FakeExecutor):
    """Its steps fail as long as it is told to."""

    is_failing = True

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        if self.is_failing:
            raise RuntimeError("out of luck")
        return super().forward(plan, adapters)


class LoopByHand:
    """An `EngineLoop` in a thread, messages in and out as a queue and a list."""

    def __init__(self, executor: FakeExecutor | None = None) -> None:
        self.core = make_core(executor=executor, adapters=["red"])
        self.inbox: queue.SimpleQueue[ms.ToEngine] = queue.SimpleQueue()
        self.sent: queue.SimpleQueue[ms.ToFront] = queue.SimpleQueue()
        store: Any = self.core.store
        loop = EngineLoop(LoadedEngine(self.core, store, {}), self.inbox, self._send)
        self.failed: list[EngineError] = []
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)
        self._thread.start()

    def _send(self, message: ms.ToFront) -> None:
        ms.encode(message)
        self.sent.put(message)

    def _run(self, loop: EngineLoop) -> None:
        try:
            loop.run()
        except EngineError as error:
            self.failed.append(error)

    def submit(self, request_id: str, **params: Any) -> None:
        request = self.core.door.prepare(request_id, "x", SamplingParams(**params))
        self.inbox.put(ms.Submit(request, False))

    def next_delta(self) -> ms.RequestDelta:
        message = self.sent.get(timeout=20)
        assert isinstance(message, ms.Outputs)
        assert len(message.deltas) == 1
        return message.deltas[0]

    def end(self) -> None:
        self.inbox.put(ms.Shutdown())
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_a_failed_step_fails_its_requests_and_no_others() -> None:
    executor = FailingExecutor()
    loop = LoopByHand(executor)
    loop.submit("a")
    delta = loop.next_delta()
    assert delta.is_finished
    assert delta.fault is not None
    assert (delta.fault.kind, "out of luck" in delta.fault.message) == ("EngineError", True)
    executor.is_failing = False
    loop.submit("b", max_tokens=3, ignore_eos=True)
    assert len(loop.next_delta().completions[0].token_ids) == 3
    loop.end()
    assert not loop.failed


def test_step_after_step_that_fails_ends_the_process() -> None:
    loop = LoopByHand(FailingExecutor())
    for request_id in "abc":
        loop.submit(request_id)
        assert loop.next_delta().fault is not None
    loop.end()
    assert "out of luck" in str(loop.failed[0])


def test_an_answer_too_large_for_a_message_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ms, "MAX_FRAME_BYTES", 2_000)
    loop = LoopByHand()
    loop.submit("large", max_tokens=100, ignore_eos=True, logprobs=5)
    loop.submit("small", max_tokens=100, ignore_eos=True)
    deltas = {delta.request_id: delta for delta in (loop.next_delta(), loop.next_delta())}
    fault = deltas["large"].fault
    assert fault is not None
    assert fault.kind == "RequestError"
    assert len(deltas["small"].completions[0].token_ids) == 100
    loop.end()


def test_a_request_for_weights_that_are_gone_is_refused() -> None:
    loop = LoopByHand()
    request = loop.core.door.prepare("r", "x", adapter="red")
    gone = replace(request, adapter=AdapterRef("red", "another digest", 1))
    monkey: Any = loop.core.store
    known = monkey.weights

    def weights(digest: str) -> object:
        if digest == "another digest":
            raise EngineError("not held")
        return known(digest)

    monkey.weights = weights
    loop.inbox.put(ms.Submit(gone, False))
    fault = loop.next_delta().fault
    assert fault is not None
    assert (fault.kind, fault.field) == ("RequestError", "adapter")
    loop.end()


def test_the_process_answers_as_the_engine_in_this_process(runner: asyncio.Runner, shared: AsyncLLM) -> None:
    engine = shared

    async def work() -> None:
        for adapter in (None, "red"):
            core = stub_core(adapters={"red": "red"}, max_model_len=1000)
            core.add_request("r", "hello", SamplingParams(n=2, max_tokens=30, seed=4), adapter)
            expected = run(core)["r"]
            params = SamplingParams(n=2, max_tokens=30, seed=4)
            ids = await engine.encode("hello")
            stream = engine.submit(engine.prepare(ids, params, adapter=adapter))
            found = await stream.collect("hello")
            assert found.outputs == expected.outputs
            texts = ["", ""]
            async for delta in engine.generate("hello", params, adapter=adapter):
                for change in delta.completions:
                    texts[change.index] += change.text
            assert texts == [completion.text for completion in expected.outputs]

    runner.run(work())


def test_errors_are_immediate_and_leave_nothing_in_flight(runner: asyncio.Runner, shared: AsyncLLM) -> None:
    engine = shared

    async def work() -> None:
        for bad in (
            lambda: engine.prepare([]),
            lambda: engine.prepare([999]),
            lambda: engine.prepare([1] * engine.max_model_len),
            lambda: engine.prepare([1], SamplingParams(max_tokens=engine.max_model_len)),
            lambda: engine.prepare([1], adapter="green"),
        ):
            with pytest.raises(RequestError):
                bad()
        request = engine.prepare([1], LONG)
        stream = engine.submit(request)
        with pytest.raises(RequestError, match="in use"):
            engine.submit(request)
        stream.close()
        with pytest.raises(AdapterError, match="missing"):
            await engine.add_adapter("x", "missing")
        with pytest.raises(AdapterError):
            await engine.add_adapter("\n", "x")
        with pytest.raises(RequestError):
            await engine.remove_adapter("x")
        assert engine.num_in_flight == 0

    runner.run(work())


def test_a_request_too_large_for_the_pool_is_the_requests_fault(
    runner: asyncio.Runner, shared: AsyncLLM
) -> None:
    engine = shared

    async def work() -> None:
        with pytest.raises(RequestError, match="pages"):
            await engine.submit(engine.prepare([1] * 60, SamplingParams(max_tokens=1500))).collect()
        await engine.submit(engine.prepare([1] * 10)).collect()

    runner.run(work())


def test_abort_ends_a_stream_and_frees_its_pages(runner: asyncio.Runner, shared: AsyncLLM) -> None:
    engine = shared

    async def work() -> None:
        deltas = []
        async for delta in engine.generate([1] * 100, LONG, request_id="a"):
            deltas.append(delta)
            if len(deltas) == 3:
                engine.abort("a")
        assert deltas[-1].completions[0].finish_reason is FinishReason.ABORT
        async for _ in engine.generate([1] * 100, LONG):
            break
        while (stats := await engine.stats()).scheduler.num_running:
            await asyncio.sleep(0.01)
        assert stats.scheduler.num_kv_pages == 0

    runner.run(work())


def test_a_killed_process_fails_its_requests_and_comes_back_with_its_adapters() -> None:
    async def work() -> None:
        async with llm("stub:step_s=0.01") as engine:
            await engine.add_adapter("blue", "blue")
            await engine.remove_adapter("red")
            streams = [engine.submit(engine.prepare([1], LONG), is_streamed=bool(i)) for i in range(2)]
            await anext(streams[1])
            stats = asyncio.create_task(engine.stats())
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            for stream in streams:
                with pytest.raises(EngineDownError, match="SIGKILL"):
                    async for _ in stream:
                        pass
            assert not engine.health().is_ready
            with pytest.raises(EngineDownError, match="try again"):
                engine.submit(engine.prepare([1]))
            await asyncio.wait((stats,))
            await engine.wait_ready()
            assert engine.health().is_ready
            assert engine.num_restarts == 1
            assert [ref.name for ref in engine.adapters] == ["blue"]
            await engine.submit(engine.prepare([1], adapter="blue")).collect()

    run_async(work())


@pytest.mark.parametrize("how", ["silent", "stuck"])
def test_a_process_that_hangs_is_replaced(how: str) -> None:
    async def work() -> None:
        model = "stub" if how == "silent" else "stub:step_s=1000"
        async with llm(model, replace(FAST, stall_s=0.5)) as engine:
            old = engine.pid
            assert old is not None
            await asyncio.sleep(0.8)
            assert engine.pid == old, "an idle process does not hang"
            if how == "silent":
                os.kill(old, signal.SIGSTOP)
            stream = engine.submit(engine.prepare([1], LONG))
            with pytest.raises(EngineDownError, match="sign of life" if how == "silent" else "no step"):
                await stream.collect()
            await engine.wait_ready()
            assert engine.pid != old
            with pytest.raises(ProcessLookupError):
                os.kill(old, 0)

    run_async(work())


def test_a_process_that_cannot_come_back_is_given_up() -> None:
    async def work() -> None:
        async with llm(watch=replace(FAST, max_restarts=2)) as engine:
            engine.model = "stub:nonsense=1"
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            reason = await engine.wait_failed()
            assert "nonsense" in reason
            assert engine.state is EngineState.FAILED
            with pytest.raises(EngineError, match="does not come back"):
                await engine.wait_ready()
            with pytest.raises(EngineDownError):
                engine.submit(engine.prepare([1]))

    run_async(work())


def test_what_keeps_the_model_from_loading_is_raised() -> None:
    async def work() -> None:
        with pytest.raises(ConfigError, match="option"):
            await llm("stub:x=1").start()
        with pytest.raises(AdapterError, match="missing"):
            await AsyncLLM("stub", {"x": "missing"}).start()

    run_async(work())


def test_closing_leaves_no_process_no_socket_and_no_request() -> None:
    def sockets() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("polybatch-*/engine.sock"))

    async def work() -> None:
        before = sockets()
        engine = llm("stub:step_s=0.01")
        await engine.start()
        pid = engine.pid
        assert pid is not None
        assert sockets() <= before
        stream = engine.submit(engine.prepare([1], LONG))
        await engine.close()
        await engine.close()
        with pytest.raises(EngineDownError):
            await stream.collect()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run_async(work())


def test_nobody_else_may_enter_the_sockets_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from polybatch.engine import connection

    with connection._socket_folder() as path:
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()
