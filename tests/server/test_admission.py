"""The bounded queue, by itself and over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_helpers import RunningServer

from polybatch.server.admission import Admission, Ticket
from polybatch.server.errors import HttpError
from polybatch.structured import checker


def test_what_fits_the_engine_never_waits() -> None:
    admission = Admission(4, 100, 1, 1)
    tickets = [admission.enter(1, 25) for _ in range(4)]
    assert admission.num_queued_seqs == 0
    waiting = admission.enter(1, 1)
    assert admission.num_queued_seqs == 1
    with pytest.raises(HttpError) as caught:
        admission.enter(1, 1)
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    admission.leave(tickets[0])
    assert waiting.is_running
    assert admission.num_queued_seqs == admission.num_queued_tokens == 0


def test_a_call_of_any_size_may_wait_in_an_empty_queue() -> None:
    admission = Admission(1, 10, 1, 1)
    first = admission.enter(1, 5)
    huge = admission.enter(50, 5000)
    with pytest.raises(HttpError):
        admission.enter(1, 1)
    admission.leave(first)
    assert huge.is_running


def test_waiting_longer_is_advised_when_calls_end_slowly() -> None:
    now = 0.0
    admission = Admission(1, 10, 20, 1000, clock=lambda: now)
    tickets = [admission.enter(1, 1) for _ in range(21)]
    for ticket in tickets[:3]:
        now += 2.0
        admission.leave(ticket)
    for _ in range(3):
        admission.enter(1, 1)
    with pytest.raises(HttpError) as caught:
        admission.enter(1, 1)
    assert 10 <= int(caught.value.headers["Retry-After"]) <= 60


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5), st.integers(1, 40)), max_size=80))
def test_counts_are_those_of_the_tickets(events: list[tuple[bool, int, int]]) -> None:
    admission = Admission(8, 100, 10, 120)
    tickets: list[Ticket] = []
    for is_entry, num_seqs, num_tokens in events:
        if is_entry or not tickets:
            with contextlib.suppress(HttpError):
                tickets.append(admission.enter(num_seqs, num_tokens))
        else:
            admission.leave(tickets.pop(num_tokens % len(tickets)))
        running = [ticket for ticket in tickets if ticket.is_running]
        waiting = [ticket for ticket in tickets if not ticket.is_running]
        assert admission.num_running_seqs == sum(ticket.num_seqs for ticket in running)
        assert admission.num_running_tokens == sum(ticket.num_tokens for ticket in running)
        assert admission.num_queued_seqs == sum(ticket.num_seqs for ticket in waiting)
        assert admission.num_queued_tokens == sum(ticket.num_tokens for ticket in waiting)
        assert running or not waiting


def test_a_full_queue_is_answered_with_429_until_there_is_room() -> None:
    config = {"max_num_queued_reqs": 2}
    with RunningServer("stub:step_s=0.02", config=config, max_num_seqs=1) as server:
        statuses: list[int] = []
        body = {"max_tokens": 20, "ignore_eos": True}

        def ask() -> None:
            statuses.append(server.complete(**body).status_code)

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        assert server.complete(**body).status_code == 200
        assert server.state.admission.num_running_seqs == server.state.admission.num_queued_seqs == 0


def test_a_full_queue_of_grammars_is_answered_with_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checker, "MAX_WAITING", 1)
    with RunningServer() as server:
        server.complete(regex="a+", max_tokens=4)
        waiting = asyncio.run_coroutine_threadsafe(hold(server), server._loop).result(20)
        refused = server.complete(regex="b+", max_tokens=4)
        assert refused.status_code == 429, refused.text
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["Retry-After"]) > 0
        assert server.complete(regex="a+", max_tokens=4).status_code == 200
        server._loop.call_soon_threadsafe(waiting.set)
        for _ in range(200):
            answer = server.complete(regex="b+", max_tokens=4)
            if answer.status_code == 200:
                break
            time.sleep(0.02)
        assert answer.status_code == 200


async def hold(server: RunningServer) -> asyncio.Event:
    """Keep the process that tries out grammars busy until the event is set."""
    found = server.llm._checker
    assert found is not None
    held, until = asyncio.Event(), asyncio.Event()

    async def keep() -> None:
        async with found._lock:
            held.set()
            await until.wait()

    found._num_waiting += 1
    task = asyncio.create_task(keep())
    task.add_done_callback(lambda _: setattr(found, "_num_waiting", found._num_waiting - 1))
    await held.wait()
    return until
