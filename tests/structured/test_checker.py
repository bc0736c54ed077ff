"""What takes too long or too much ends a process of its own, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Coroutine
from typing import Any

import pytest

from polybatch.errors import EngineError, RequestError
from polybatch.execution.fake import ByteTokenizer
from polybatch.structured import checker as checking
from polybatch.structured.checker import BusyError, GrammarChecker
from polybatch.structured.spec import StructuredSpec
from polybatch.structured.vocabulary import Vocabulary, vocabulary_of


def vocabulary() -> Vocabulary:
    return vocabulary_of(ByteTokenizer(), 300, (256,))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_verdicts_are_those_of_the_compiler_and_remembered() -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary)
        await checker.check(StructuredSpec(regex="a+"))
        for _ in range(2):
            with pytest.raises(RequestError, match="unclosed group") as caught:
                await checker.check(StructuredSpec(regex="("))
            assert caught.value.field == "regex"
        await checker.close()
        # Known ones need no process.
        await checker.check(StructuredSpec(regex="a+"))
        assert checker._process is None
        await checker.close()

    run(work())


def test_a_spec_that_takes_too_long_is_refused_and_the_next_is_served() -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary, max_s=0.0)
        with pytest.raises(RequestError, match="to compile: simplify it"):
            await checker.check(StructuredSpec(regex="b+"))
        checker._max_s = 30.0
        await checker.check(StructuredSpec(regex="a+"))
        await checker.close()

    run(work())


def test_a_process_that_dies_is_replaced() -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary)
        await checker.check(StructuredSpec(regex="a+"))
        assert checker._process is not None
        checker._process.kill()
        await checker._process.wait()
        # Nobody knows of it: the spec is not to blame.
        await checker.check(StructuredSpec(regex="b+"))
        await checker.close()

    run(work())


def test_what_kills_every_process_is_an_error_of_the_server_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary)
        exchange = checker._exchange

        async def killed(spec: StructuredSpec) -> str | None:
            if spec.regex is not None and checker._process is not None:
                checker._process.kill()
            return await exchange(spec)

        with monkeypatch.context() as patch:
            patch.setattr(checker, "_exchange", killed)
            with pytest.raises(EngineError, match="SIGKILL"):
                await checker.check(StructuredSpec(regex="a+"))
        await checker.check(StructuredSpec(regex="a+"))
        await checker.close()

    run(work())


def test_a_spec_that_takes_too_much_memory_is_told_so() -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary, max_s=30.0)
        await checker.check(StructuredSpec(regex="a+"))
        assert checker._process is not None
        pid = checker._process.pid
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
            _, hard = resource.prlimit(pid, limit)
            resource.prlimit(pid, limit, (1 << 20, hard))
        large = StructuredSpec(choice=[f"{i:060}" for i in range(4_000)])
        for _ in range(2):
            with pytest.raises(RequestError, match="of memory to compile: simplify it"):
                await checker.check(large)
        await checker.check(StructuredSpec(regex="b+"))
        await checker.close()

    run(work())


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_compiler_that_breaks_is_not_said_to_lack_memory(number: signal.Signals) -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary)
        await checker.check(StructuredSpec(regex="a+"))
        assert checker._process is not None
        checker._process.send_signal(number)
        with pytest.raises(RequestError, match=f"compiling it failed .{number.name}"):
            await checker.check(StructuredSpec(regex="b+"))
        await checker.check(StructuredSpec(regex="c+"))
        await checker.close()

    run(work())


def test_a_caller_who_leaves_disturbs_no_other() -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary)
        await checker.check(StructuredSpec(regex="a+"))
        leaving = asyncio.create_task(checker.check(StructuredSpec(regex="(")))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait((leaving,))
        await checker.check(StructuredSpec(regex="b+"))
        await checker.close()

    run(work())


def test_those_who_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        monkeypatch.setattr(checking, "MAX_WAITING", 2)
        checker = GrammarChecker(vocabulary)
        calls = [checker.check(StructuredSpec(regex=f"a{{{i + 1}}}")) for i in range(5)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(result, BusyError) for result in results] == [False, False, True, True, True]
        await checker.close()

    run(work())


def test_a_process_that_does_not_start_is_no_fault_of_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        checker = GrammarChecker(vocabulary)
        with monkeypatch.context() as patch:
            patch.setattr(checking.sys, "executable", "/bin/true")
            with pytest.raises(EngineError, match="does not start"):
                await checker.check(StructuredSpec(regex="a+"))
        await checker.check(StructuredSpec(regex="a+"))
        await checker.close()

    run(work())
