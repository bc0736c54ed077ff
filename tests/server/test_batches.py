"""Batches through the official client: statuses, files, deadlines, tenants, and yielding to live requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from batch_helpers import begin, lines_of, row, until, upload
from server_helpers import RunningServer

LONG = {"max_tokens": 900}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    config = {"data_dir": tmp_path_factory.mktemp("data"), "max_tenant_batches": 3}
    with RunningServer(adapters={"red": "red"}, config=config) as running:
        yield running


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Four completions at once, 5 ms a token."""
    config = {"data_dir": tmp_path_factory.mktemp("data")}
    with RunningServer("stub:step_s=0.005", config=config, max_num_seqs=4) as running:
        yield running


def test_every_row_is_answered_as_a_live_request_would_be(server: RunningServer) -> None:
    rows = [row(f"r{i}", f"prompt {i}", model=("base", "red")[i % 2], temperature=0) for i in range(50)]
    batch = begin(server.openai, rows, metadata={"for": "test"})
    assert batch.status == "validating"
    assert batch.expires_at == batch.created_at + 86_400
    done = until(server.openai, batch.id)
    assert (done.status, done.metadata, done.error_file_id) == ("completed", {"for": "test"}, None)
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (
        50,
        50,
        0,
    )
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at  # type: ignore[operator]
    lines = lines_of(server.openai, done.output_file_id)
    assert lines.keys() == {f"r{i}" for i in range(50)}
    for asked in rows[:4]:
        live = server.client.post("/v1/completions", json=asked["body"]).json()
        answer = lines[asked["custom_id"]]["response"]
        assert answer["status_code"] == 200
        assert answer["body"]["choices"] == live["choices"]
        assert answer["body"]["system_fingerprint"] == live["system_fingerprint"]


def test_chat_rows_and_rows_of_several_completions_are_answered(server: RunningServer) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "n": 3}
    asked = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body}
    done = until(server.openai, begin(server.openai, [asked], endpoint="/v1/chat/completions").id)
    answer = lines_of(server.openai, done.output_file_id)["c"]["response"]["body"]
    assert answer["object"] == "chat.completion"
    assert len(answer["choices"]) == 3
    assert server.state.batches is not None
    assert server.state.batches.capacity.num_in_flight == 0


def test_bad_lines_go_to_the_error_file_and_harm_no_other(server: RunningServer) -> None:
    bad = [
        b"{not json",
        row("unknown", model="nobody"),
        row("field", flavour="sweet"),
        row("stream", stream=True),
        row("due", deadlines={"e2e_ms": 60_000}),
        row("long", prompt="x" * 2000),
        {**row("url"), "url": "/v1/chat/completions"},
    ]
    good = [row("a"), row("b", expected_tokens=4)]
    done = until(server.openai, begin(server.openai, [good[0], *bad, good[1]]).id)
    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (2, 7)
    assert lines_of(server.openai, done.output_file_id).keys() == {"a", "b"}
    errors = lines_of(server.openai, done.error_file_id)
    assert errors.keys() == {None, "unknown", "field", "stream", "due", "long", "url"}
    assert errors["unknown"]["response"]["status_code"] == 404
    assert errors["unknown"]["error"]["code"] == "model_not_found"
    assert errors["field"]["response"]["status_code"] == 400
    assert "line 4" in errors["field"]["error"]["message"]
    assert "flavour" in errors["field"]["error"]["message"]
    # It would be measured from when the row got its turn, and be kept by no policy that batches run under.
    assert "completion_window" in errors["due"]["error"]["message"]


@pytest.mark.parametrize(
    ("rows", "said"), [([row("a"), row("a")], "'a' is on lines 1 and 2"), ([b" "], "no requests")]
)
def test_a_file_that_cannot_be_run_fails_the_batch(
    server: RunningServer, rows: list[object], said: str
) -> None:
    done = until(server.openai, begin(server.openai, rows).id)
    assert done.status == "failed"
    assert done.errors is not None
    assert done.errors.data is not None
    assert said in str(done.errors.data[0].message)
    assert done.output_file_id is None


def test_rows_left_at_the_deadline_expire_and_the_others_are_kept(slow: RunningServer) -> None:
    rows = [row("quick"), *(row(f"r{i}", **LONG) for i in range(30))]
    done = until(slow.openai, begin(slow.openai, rows, window="2s").id)
    assert done.status == "expired"
    assert done.expired_at is not None
    assert done.expired_at >= done.expires_at  # type: ignore[operator]
    assert "quick" in lines_of(slow.openai, done.output_file_id)
    errors = lines_of(slow.openai, done.error_file_id)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}
    assert done.request_counts is not None
    assert done.request_counts.completed + done.request_counts.failed == 31
    slow.until_idle()


def test_a_cancelled_batch_keeps_what_was_answered_and_frees_the_engine(slow: RunningServer) -> None:
    rows = [row("quick"), *(row(f"r{i}", **LONG) for i in range(30))]
    batch = begin(slow.openai, rows)
    while slow.openai.batches.retrieve(batch.id).request_counts.completed == 0:  # type: ignore[union-attr]
        time.sleep(0.02)
    assert slow.openai.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = until(slow.openai, batch.id)
    assert (done.status, done.error_file_id) == ("cancelled", None)
    assert "quick" in lines_of(slow.openai, done.output_file_id)
    slow.until_idle()
    with pytest.raises(openai.ConflictError):
        slow.openai.batches.cancel(batch.id)


def test_a_live_request_is_admitted_before_all_rows_of_a_batch(slow: RunningServer) -> None:
    batch = begin(slow.openai, [row(f"r{i}", **LONG) for i in range(40)])
    until(slow.openai, batch.id, "in_progress")
    time.sleep(0.3)
    answers = []

    def ask() -> None:
        answers.append(slow.complete(max_tokens=5).status_code)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    # Rows that run take seconds; all live requests, as many as there are slots, were done before any of them.
    assert answers == [200] * 4
    counts = slow.openai.batches.retrieve(batch.id).request_counts
    assert counts is not None
    assert counts.completed == 0
    slow.openai.batches.cancel(batch.id)
    until(slow.openai, batch.id)


def test_no_further_row_is_sent_while_a_live_request_waits(slow: RunningServer) -> None:
    service = slow.state.batches
    assert service is not None
    assert service.capacity.limit == 5
    ticket = slow.state.admission.enter(2, 1)
    try:
        assert service.capacity.limit == 1
        more = slow.state.admission.enter(4, 1)
        assert service.capacity.limit == 0
        slow.state.admission.leave(more)
    finally:
        slow.state.admission.leave(ticket)


def test_the_nearest_deadline_is_served_first(slow: RunningServer) -> None:
    late = begin(slow.openai, [row(f"r{i}", max_tokens=100) for i in range(60)], window="2d")
    until(slow.openai, late.id, "in_progress")
    soon = begin(slow.openai, [row(f"r{i}") for i in range(10)], window="1h")
    assert until(slow.openai, soon.id).status == "completed"
    assert slow.openai.batches.retrieve(late.id).status == "in_progress"
    slow.openai.batches.cancel(late.id)
    until(slow.openai, late.id)


def test_deleting_the_input_does_not_harm_a_batch(slow: RunningServer) -> None:
    file_id = upload(slow.openai, [row(f"r{i}", max_tokens=20) for i in range(20)])
    batch = slow.openai.batches.create(
        input_file_id=file_id, endpoint="/v1/completions", completion_window="24h"
    )
    assert slow.openai.files.delete(file_id).deleted
    assert until(slow.openai, batch.id).request_counts.completed == 20  # type: ignore[union-attr]


def test_batches_are_listed_newest_first_page_by_page(server: RunningServer) -> None:
    made = [begin(server.openai, [row("a")]).id for _ in range(3)]
    for batch_id in made:
        until(server.openai, batch_id)
    page = server.openai.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:0:-1]
    assert page.has_more
    rest = server.openai.batches.list(limit=100, after=page.data[-1].id)
    assert rest.data[0].id == made[0]
    assert not rest.has_more
    assert server.client.get("/v1/batches", params={"limit": "many"}).status_code == 400


@pytest.mark.parametrize(
    ("change", "status", "field"),
    [
        ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"completion_window": "99d"}, 400, "completion_window"),
        ({"input_file_id": "file-none"}, 404, "file_id"),
        ({"input_file_id": "../batches.sqlite"}, 404, "file_id"),
        ({"metadata": {"k" * 65: "v"}}, 400, "metadata"),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
            400,
            "output_expires_after.seconds",
        ),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_a_wrong_batch_is_refused_by_field(
    server: RunningServer, change: dict[str, object], status: int, field: str
) -> None:
    body = {"input_file_id": upload(server.openai, [row("a")]), "endpoint": "/v1/completions"} | change
    response = server.client.post("/v1/batches", json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == field


def test_a_tenant_may_have_so_many_batches_under_way(tmp_path: Path) -> None:
    config = {"data_dir": tmp_path, "max_tenant_batches": 1}
    with RunningServer("stub:step_s=0.01", config=config) as running:
        batch = begin(running.openai, [row("a", **LONG)])
        with pytest.raises(openai.RateLimitError):
            begin(running.openai, [row("a")])
        running.openai.batches.cancel(batch.id)
        until(running.openai, batch.id)
        begin(running.openai, [row("a")])


def test_tenants_see_only_their_own(tmp_path: Path) -> None:
    config = {"data_dir": tmp_path, "api_keys": ("one", "two")}
    with RunningServer(config=config) as running:
        mine = running.openai.with_options(api_key="one")
        theirs = running.openai.with_options(api_key="two")
        batch = begin(mine, [row("a")])
        done = until(mine, batch.id)
        assert done.output_file_id is not None
        for call in (
            lambda: theirs.batches.retrieve(batch.id),
            lambda: theirs.batches.cancel(batch.id),
            lambda: theirs.files.retrieve(done.input_file_id),
            lambda: theirs.files.content(str(done.output_file_id)),
            lambda: theirs.files.delete(done.input_file_id),
            lambda: theirs.batches.create(
                input_file_id=done.input_file_id, endpoint="/v1/completions", completion_window="24h"
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert theirs.files.list().data == []
        assert theirs.batches.list().data == []
        assert theirs.batches.list(after=batch.id).data == []
        assert len(mine.files.list().data) == 2
