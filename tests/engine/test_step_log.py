"""What the step log and snapshots say agrees with what the engine did."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from engine_helpers import make_core, run
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.engine.core import EngineCore
from polybatch.engine.snapshot import EngineSnapshot, PageKind, page_map, take_snapshot
from polybatch.engine.step_log import RequestTrace
from polybatch.errors import EngineError
from polybatch.execution.fake import FakeExecutor
from polybatch.request import SamplingParams

FREE, CACHED, KV, ADAPTER = PageKind


def add(core: EngineCore, name: str, length: int, adapter: str | None = None, **params: object) -> None:
    settings = {"max_tokens": 5, "ignore_eos": True, **params}
    core.add_request(name, [i % 250 for i in range(1, length + 1)], SamplingParams(**settings), adapter)  # type: ignore[arg-type]


def trace_of(core: EngineCore, name: str) -> RequestTrace:
    return next(trace for trace in core.step_log.traces(core.live()) if trace.request_id == name)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 120), st.sampled_from([None, "a", "b"]), st.integers(1, 9), st.integers(1, 2)
        ),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=15, deadline=None)
def test_steps_hold_every_token_that_was_computed_once(
    requests: list[tuple[int, str | None, int, int]],
) -> None:
    core = make_core(num_pages=80, adapters=["a", "b"])
    for i, (length, adapter, max_tokens, n) in enumerate(requests):
        add(core, str(i), length, adapter, max_tokens=max_tokens, n=n)
    run(core)
    steps = core.step_log.steps_after(-1)
    stats = core.stats()
    assert [step.index for step in steps] == list(range(len(steps)))
    assert sum(sum(step.prefill.values()) for step in steps) == stats.scheduler.num_prefill_tokens
    total = sum(sum(step.prefill.values()) + sum(step.decode.values()) for step in steps)
    assert total == stats.times.num_tokens
    assert sum(step.num_preempted for step in steps) == stats.scheduler.num_preemptions
    assert sum(step.num_loads for step in steps) == stats.scheduler.num_adapter_loads


def test_decoding_and_prefill_are_told_apart_by_adapter() -> None:
    core = make_core(adapters=["a"])
    add(core, "one", 7)
    core.step()
    add(core, "two", 9, "a")
    core.step()
    assert core.step_log.steps_after(0)[0].decode == {"": 1}
    assert core.step_log.steps_after(0)[0].prefill == {"a": 9}


def test_a_trace_tells_chunks_cache_and_output() -> None:
    core = make_core(max_num_batched_tokens=64)
    add(core, "first", 150)
    run(core)
    add(core, "again", 150)
    run(core)
    first, again = trace_of(core, "first"), trace_of(core, "again")
    assert (first.num_chunks, first.num_cached, first.num_output, first.status) == (3, 0, 5, "length")
    assert (again.num_chunks, again.num_cached) == (1, 149)
    assert first.arrival_s <= first.first_scheduled_s <= first.first_token_s <= first.finished_s  # type: ignore[operator]


def test_a_request_that_ends_with_its_first_step_keeps_its_chunk() -> None:
    core = make_core()
    add(core, "one", 9, max_tokens=1)
    run(core)
    assert trace_of(core, "one").num_chunks == 1


def test_only_a_request_that_came_before_its_adapter_notes_the_load() -> None:
    core = make_core(adapters=["a"])
    add(core, "early", 9, "a")
    run(core)
    add(core, "late", 9, "a")
    run(core)
    assert trace_of(core, "early").adapter_load_s is not None
    assert trace_of(core, "late").adapter_load_s is None


def test_the_log_is_bounded_and_forgets_the_finished() -> None:
    core = make_core()
    for i in range(100):
        add(core, str(i), 3, max_tokens=1)
        run(core)
    for i in range(300):
        add(core, f"long{i}", 3, max_tokens=2)
        core.step()
    core.abort("long299")
    run(core)
    assert core.step_log.num_notes == 0
    assert len(core.step_log.steps_after(-1)) == 256
    assert len(core.step_log.traces(core.live())) == 64


def test_a_failed_step_leaves_no_record_and_no_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    add(core, "one", 9)

    def fail(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(FakeExecutor, "forward", fail)
    with pytest.raises(EngineError):
        core.step()
    assert core.step_log.steps_after(-1) == []
    assert core.step_log.num_notes == 0
    assert trace_of(core, "one").status == "error"


def cells_of(core: EngineCore, **limits: int) -> list[int]:
    runs = page_map(core.scheduler.arena, **limits).runs
    return np.repeat(runs[::2], runs[1::2]).tolist()  # type: ignore[no-any-return]


def test_the_page_map_counts_what_the_statistics_count() -> None:
    core = make_core(num_pages=64, adapters=["a"])
    add(core, "done", 40)
    run(core)
    add(core, "live", 21, "a", max_tokens=30)
    core.step()
    stats, cells = core.stats().scheduler, cells_of(core)
    found = [cells.count(kind) for kind in (FREE, CACHED, KV, ADAPTER)]
    assert found == [
        stats.num_free_pages, stats.num_cached_pages, stats.num_kv_pages, stats.num_adapter_pages
    ]  # fmt: skip
    assert min(found) > 0


def test_a_cell_of_many_pages_shows_the_highest_kind() -> None:
    core = make_core(num_pages=64)
    add(core, "live", 21, max_tokens=30)
    core.step()
    cells, coarse = cells_of(core), cells_of(core, max_cells=5)
    assert coarse == [max(cells[start : start + 13]) for start in range(0, 64, 13)]


def test_a_snapshot_survives_its_journey() -> None:
    core = make_core(adapters=["a"])
    add(core, "one", 30, "a")
    add(core, "two", 30)
    core.step()
    snapshot = take_snapshot(core, -1)
    assert (snapshot.running, snapshot.waiting) == ({"a": 1, "": 1}, {})
    assert [entry.name for entry in snapshot.resident] == ["a"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(snapshot), type=EngineSnapshot) == snapshot
    assert take_snapshot(core, 0).steps == []


def test_time_between_two_steps_is_the_second_ones_and_a_rest_is_nobodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("time.perf_counter", clock)
    core = make_core()
    for name, left_out in (("one", 0.0), ("two", 1000.0)):
        add(core, name, 7)
        num_seen = len(core.step_log.steps_after(-1))
        while core.has_work():
            core.step()
            now += 1000.0
            core.leave_out(left_out)
        steps = core.step_log.steps_after(num_seen - 1)
        between = (1000.0 - left_out) * (len(steps) - 1)
        assert len(steps) > 2
        assert sum(step.duration_s for step in steps) == pytest.approx(between, abs=20.0 * len(steps))
        assert 0 < steps[0].duration_s < 1000.0
        now += 1e6
