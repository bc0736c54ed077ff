"""What rows of batches get beside live requests, and when their batch's deadline counts for more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_helpers import begin, grow_old, row, until
from server_helpers import RunningServer

from polybatch.server.admission import Admission
from polybatch.server.batches.objects import Batch, RequestCounts
from polybatch.server.batches.slots import BatchSlots, Capacity

HOUR_S = 3_600


def batch(*, elapsed: float = 0.0, done: int = 0, total: int = 100, name: str = "batch") -> Batch:
    """elapsed: share of its window, an hour."""
    created_s = int(time.time() - elapsed * HOUR_S)
    return Batch(
        id=name, tenant="", input_file_id="file", endpoint="/v1/completions", completion_window="1h",
        created_s=created_s, expires_s=created_s + HOUR_S, counts=RequestCounts(total, done, 0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("elapsed", "done", "is_behind"),
    [(0.0, 0, False), (0.49, 0, False), (0.55, 0, True), (0.7, 51, False), (0.7, 48, True),
     (0.9, 99, True), (0.95, 100, False)],
)  # fmt: skip
def test_a_batch_is_behind_that_would_not_be_done_in_nine_tenths_of_its_window(
    elapsed: float, done: int, is_behind: bool
) -> None:
    assert batch(elapsed=elapsed, done=done).is_behind(time.time()) is is_behind


def test_a_batch_without_rows_yet_is_not_behind() -> None:
    assert not batch(elapsed=0.8, total=0).is_behind(time.time())


def busy_capacity() -> Capacity:
    """Eight slots, all of them with live requests, and one more that waits."""
    admission = Admission(8, 1_000, 100, 1_000)
    admission.enter(8, 8)
    admission.enter(1, 1)
    return Capacity(admission, max_seqs=8)


async def num_granted(capacity: Capacity, batch: Batch, count: int) -> int:
    """Of so many rows, how many get their slot, and are promoted, while nothing else changes."""
    granted = 0
    for _ in range(count):
        waiting = asyncio.create_task(BatchSlots(capacity, batch).acquire())
        await asyncio.sleep(0)
        if waiting.done():
            granted += capacity.promote(1, batch)
        else:
            waiting.cancel()
            await asyncio.wait((waiting,))
    return granted


def test_live_requests_hold_up_rows_until_their_batch_falls_behind() -> None:
    async def work() -> None:
        assert await num_granted(busy_capacity(), batch(elapsed=0.3), 4) == 0
        assert await num_granted(busy_capacity(), batch(elapsed=0.8), 1) == 1

    asyncio.run(work())


def test_there_is_one_promoted_row_per_four_live_requests_that_run_or_wait() -> None:
    async def work() -> None:
        capacity, late = busy_capacity(), batch(elapsed=0.95)
        assert await num_granted(capacity, late, 8) == capacity.num_promoted == 2
        capacity.demote(1, late)
        assert await num_granted(capacity, late, 8) == 0
        BatchSlots(capacity, late).release()
        assert await num_granted(capacity, late, 8) == 1

    asyncio.run(work())


def test_a_row_of_many_completions_is_promoted_alone() -> None:
    capacity, late = busy_capacity(), batch(elapsed=0.95)
    assert capacity.promote(100, late)
    assert not capacity.promote(1, late)
    capacity.demote(100, late)
    assert capacity.promote(1, late)
    assert not capacity.promote(100, late)


def test_a_batch_that_is_behind_passes_one_with_a_nearer_deadline_that_is_not() -> None:
    async def work() -> None:
        capacity = busy_capacity()
        easy, late = batch(elapsed=0.85, done=99), batch(elapsed=0.8)
        assert easy.expires_s < late.expires_s
        first = asyncio.create_task(BatchSlots(capacity, easy).acquire())
        second = asyncio.create_task(BatchSlots(capacity, late).acquire())
        await asyncio.sleep(0.05)
        assert (first.done(), second.done()) == (False, True)
        first.cancel()
        await asyncio.wait((first,))

    asyncio.run(work())


def test_a_batch_learns_without_a_slot_that_it_has_no_further_row() -> None:
    async def work() -> None:
        done = BatchSlots(busy_capacity(), batch(elapsed=0.1, done=100))
        await asyncio.wait_for(done.acquire(), 30)
        waiting = asyncio.create_task(BatchSlots(busy_capacity(), batch(elapsed=0.1, done=99)).acquire())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait((waiting,))

    asyncio.run(work())


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Four completions at once, 5 ms a token."""
    config = {"data_dir": tmp_path_factory.mktemp("data")}
    with RunningServer("stub:step_s=0.005", config=config, max_num_seqs=4) as running:
        yield running


def test_a_batch_whose_window_nears_its_end_is_done_beside_live_requests_without_pause(
    server: RunningServer,
) -> None:
    tickets = [server.state.admission.enter(count, 1) for count in (4, 1)]
    made = begin(server.openai, [row(f"r{i}", n=1 + i % 2) for i in range(6)])
    until(server.openai, made.id, "in_progress")
    time.sleep(0.2)
    counts = server.openai.batches.retrieve(made.id).request_counts
    assert counts is not None
    assert counts.completed == 0
    grow_old(server, made.id)
    assert until(server.openai, made.id).status == "completed"
    service = server.state.batches
    assert service is not None
    assert (service.capacity.num_in_flight, service.capacity.num_promoted) == (0, 0)
    for ticket in tickets:
        server.state.admission.leave(ticket)


def test_rows_that_are_in_the_engine_already_are_promoted_too(server: RunningServer) -> None:
    made = begin(server.openai, [row(f"r{i}", max_tokens=600) for i in range(3)])
    until(server.openai, made.id, "in_progress")
    time.sleep(0.3)
    tickets = [server.state.admission.enter(count, 1) for count in (4, 1)]
    grow_old(server, made.id)
    service = server.state.batches
    assert service is not None
    end = time.monotonic() + 30
    while not service.capacity.num_promoted:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert until(server.openai, made.id).status == "completed"
    assert (service.capacity.num_in_flight, service.capacity.num_promoted) == (0, 0)
    for ticket in tickets:
        server.state.admission.leave(ticket)
    server.until_idle()


def test_promoted_rows_are_within_the_limits_of_their_tenant(tmp_path: Path) -> None:
    (tmp_path / "tenants.yaml").write_text("default: {max_reqs: 1}")
    config = {"data_dir": tmp_path / "data", "tenants_file": tmp_path / "tenants.yaml"}
    with RunningServer("stub:step_s=0.005", config=config, max_num_seqs=4) as server:
        admission, tenants = server.state.admission, server.state.tenants
        others = [admission.enter(count, 1, "other") for count in (4, 1)]
        own = admission.enter(1, 1, "", tenants.limits(""))
        made = begin(server.openai, [row(f"r{i}", max_tokens=900) for i in range(2)])
        until(server.openai, made.id, "in_progress")
        grow_old(server, made.id)
        service = server.state.batches
        assert service is not None
        end = time.monotonic() + 30
        while not service.capacity.num_in_flight:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert (service.capacity.num_in_flight, service.capacity.num_promoted) == (1, 0)
        admission.leave(own)
        assert until(server.openai, made.id).status == "completed"
        for ticket in others:
            admission.leave(ticket)
        assert admission.num_running_seqs == admission.num_queued_seqs == 0
