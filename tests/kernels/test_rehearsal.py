"""Launches in a rehearsal compile and do not run."""

from __future__ import annotations

from typing import Any

import pytest
from triton.runtime import _async_compile
from triton.runtime.jit import JITFunction

from polybatch.kernels.rehearsal import rehearsal


def kernel(x: int) -> None: ...


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append((args, grid, warmup, options))

    monkeypatch.setattr(JITFunction, "run", run)
    return seen


def test_launches_compile_with_what_they_were_given(launches: list[tuple[Any, ...]]) -> None:
    with rehearsal(2):
        JITFunction(kernel)[(3,)](1, num_warps=2)
    JITFunction(kernel)[(3,)](1, num_warps=2)
    assert launches == [((1,), (3,), True, {"num_warps": 2}), ((1,), (3,), False, {"num_warps": 2})]


def test_a_rehearsal_that_fails_leaves_nothing_behind(launches: list[tuple[Any, ...]]) -> None:
    before = JITFunction.run
    with pytest.raises(ZeroDivisionError), rehearsal(1):
        raise ZeroDivisionError
    assert JITFunction.run is before
    with rehearsal(1):
        JITFunction(kernel)[(1,)](1)
    assert launches[0][2] is True


def test_a_kernel_that_does_not_compile_ends_the_rehearsal_with_its_error_and_nothing_else() -> None:
    def fail() -> None:
        raise MemoryError("too many registers")

    before = JITFunction.run
    finished: list[object] = []

    def rehearse() -> None:
        with rehearsal(2):
            mode = _async_compile.active_mode.get()
            assert mode is not None
            mode.submit("bad", fail, finished.append)
            mode.submit("good", lambda: "good", finished.append)

    with pytest.raises(MemoryError, match="too many registers"):
        rehearse()
    assert finished == ["good"]
    assert JITFunction.run is before
    assert _async_compile.active_mode.get() is None
    with rehearsal(1):
        pass
