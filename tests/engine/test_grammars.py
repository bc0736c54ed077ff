"""Requests wait for their grammars without holding up the loop, and an abort ends the wait."""

from __future__ import annotations

import queue
from dataclasses import replace

import pytest

from polybatch.engine import messages as ms
from polybatch.engine.core import EngineCore
from polybatch.engine.grammars import WaitingForGrammars
from polybatch.engine.stub import stub_core
from polybatch.request import FinishReason, SamplingParams
from polybatch.structured.spec import StructuredSpec

Inbox = queue.SimpleQueue[ms.ToEngine]


@pytest.fixture
def core() -> EngineCore:
    return stub_core()


def submit(core: EngineCore, request_id: str, regex: str | None) -> ms.Submit:
    spec = None if regex is None else StructuredSpec(regex=regex)
    # As the front makes them: looked at, but not compiled.
    request = core.door.prepare(request_id, [1], SamplingParams(n=2))
    return ms.Submit(replace(request, params=SamplingParams(n=2, structured=spec)), True)


def test_a_request_comes_back_once_its_grammar_is_known(core: EngineCore) -> None:
    inbox: Inbox = queue.SimpleQueue()
    waiting = WaitingForGrammars(core.door.grammars, inbox)
    assert not waiting.holds(submit(core, "free", None))
    for regex in ("a+", "("):
        message = submit(core, regex, regex)
        assert waiting.holds(message)
        back = inbox.get(timeout=30)
        assert back is message
        assert not waiting.holds(message)
        # Known now, good or bad.
        assert not waiting.holds(submit(core, "next", regex))


def test_an_abort_while_waiting_ends_the_request_and_frees_its_id(core: EngineCore) -> None:
    inbox: Inbox = queue.SimpleQueue()
    waiting = WaitingForGrammars(core.door.grammars, inbox)
    first, second = submit(core, "same", "a+"), submit(core, "same", "b+")
    assert waiting.holds(first)
    ended = waiting.abort("same")
    assert ended is not None
    assert ended.is_finished
    assert [change.finish_reason for change in ended.completions] == [FinishReason.ABORT] * 2
    assert waiting.abort("same") is None
    assert waiting.holds(second)
    verdicts = {}
    for _ in range(2):
        message = inbox.get(timeout=30)
        verdicts[id(message)] = waiting.holds(message)  # type: ignore[arg-type]
    assert verdicts == {id(first): True, id(second): False}
