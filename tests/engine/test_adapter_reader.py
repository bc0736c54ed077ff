"""A folder of any size is read beside the steps, and the answer comes when it is read."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest

from polybatch.adapters.weights import AdapterWeights
from polybatch.engine import messages as ms
from polybatch.engine.process import EngineLoop, LoadedEngine
from polybatch.engine.stub import StubAdapters, stub_core
from polybatch.errors import AdapterError
from polybatch.request import SamplingParams


class SlowAdapters(StubAdapters):
    """Folders that take as long to read as the test wants."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        super().__init__({})

    def read(self, path: str | Path) -> AdapterWeights:
        assert self.may_go_on.wait(30)
        return super().read(path)


def test_steps_go_on_while_an_adapter_is_read() -> None:
    core, adapters = stub_core(), SlowAdapters()
    inbox: queue.SimpleQueue[ms.ToEngine] = queue.SimpleQueue()
    sent: queue.SimpleQueue[ms.ToFront] = queue.SimpleQueue()
    loop = EngineLoop(LoadedEngine(core, adapters, {}), inbox, sent.put)
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    inbox.put(ms.AddAdapter(1, "red", "red"))
    inbox.put(ms.AddAdapter(2, "blue", "missing"))
    inbox.put(ms.AddAdapter(3, "green", "green"))
    request = core.door.prepare("r", "x", SamplingParams(max_tokens=20, ignore_eos=True))
    inbox.put(ms.Submit(request, False))
    outputs = sent.get(timeout=30)
    # The whole request was served, and nothing was said of the adapters yet.
    assert isinstance(outputs, ms.Outputs)
    assert len(outputs.deltas[0].completions[0].token_ids) == 20
    assert sent.empty()
    assert adapters.list() == ()
    adapters.may_go_on.set()
    replies = [sent.get(timeout=30) for _ in range(3)]
    assert all(isinstance(reply, ms.Reply) for reply in replies)
    assert [reply.call_id for reply in replies if isinstance(reply, ms.Reply)] == [1, 2, 3]
    _, refused, _ = replies
    assert isinstance(refused, ms.Reply)
    assert refused.fault is not None
    with pytest.raises(AdapterError, match="missing"):
        raise ms.error_of(refused.fault)
    assert [ref.name for ref in adapters.list()] == ["red", "green"]
    inbox.put(ms.Shutdown())
    thread.join(20)
    assert not thread.is_alive()
