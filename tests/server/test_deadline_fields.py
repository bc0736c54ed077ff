"""Deadlines over HTTP: fields and headers in, forecasts and what came of them out."""

from __future__ import annotations

from typing import Any

import pytest
from server_helpers import RunningServer

from polybatch.engine import messages as ms
from polybatch.errors import DeadlineError, RequestError
from polybatch.request import Deadlines, RequestMetrics
from polybatch.server.deadline_fields import answer_headers, deadlines_from, workflow_from
from polybatch.server.errors import as_http


def test_deadlines_of_the_body_come_before_those_of_headers() -> None:
    headers = {"x-request-ttft-ms": "300", "x-request-deadline-ms": "9000"}
    assert deadlines_from({}, headers) == Deadlines(ttft_s=0.3, e2e_s=9.0)
    found = deadlines_from({"deadlines": {"ttft_ms": 500, "tpot_ms": 50}}, headers)
    assert found == Deadlines(ttft_s=0.5, tpot_s=0.05, e2e_s=9.0)
    assert deadlines_from({}, {}) is None
    assert deadlines_from({"deadlines": {}}, {}) is None


@pytest.mark.parametrize(
    ("fields", "headers", "where"),
    [
        ({"deadlines": 5}, {}, "deadlines"),
        ({"deadlines": {"ttft": 5}}, {}, "deadlines"),
        ({"deadlines": {"ttft_ms": -1}}, {}, "deadlines.ttft_ms"),
        ({"deadlines": {"e2e_ms": True}}, {}, "deadlines.e2e_ms"),
        ({"deadlines": {"e2e_ms": float("nan")}}, {}, "deadlines.e2e_ms"),
        ({}, {"x-request-tpot-ms": "soon"}, "x-request-tpot-ms"),
        ({}, {"x-request-tpot-ms": "inf"}, "x-request-tpot-ms"),
        ({}, {"x-request-tpot-ms": "1_000"}, "x-request-tpot-ms"),
        ({}, {"x-request-tpot-ms": "-5"}, "x-request-tpot-ms"),
        ({}, {"x-request-tpot-ms": "0"}, "deadlines.tpot_ms"),
    ],
)
def test_what_is_no_time_is_refused_by_name(fields: Any, headers: Any, where: str) -> None:
    with pytest.raises(RequestError) as caught:
        deadlines_from(fields, headers)
    assert caught.value.field == where


def test_a_workflow_is_due_on_the_engines_clock_and_checked() -> None:
    stage = workflow_from({"id": "w", "stage": "a", "deadline_ms": 2000, "remaining": ["b"]}, 100.0)
    assert stage is not None
    assert (stage.due_s, stage.remaining) == (102.0, ("b",))
    for bad in (5, {"id": "w"}, {"id": "", "stage": "a", "deadline_ms": 1}, {"when": 1},
                {"id": "w", "stage": "a", "deadline_ms": 1, "remaining": [5]}):  # fmt: skip
        with pytest.raises(RequestError, match="workflow"):
            workflow_from(bad, 0.0)


def test_an_answer_that_cannot_be_met_is_429_on_either_side_of_the_socket() -> None:
    error = ms.error_of(ms.fault_of(DeadlineError("too late", 7.4)))
    assert isinstance(error, DeadlineError)
    found = as_http(error)
    assert (found.status, found.code, found.headers["Retry-After"]) == (429, "deadline_unattainable", "7")


def test_headers_say_what_was_predicted_and_nothing_where_nothing_was() -> None:
    assert answer_headers(RequestMetrics(0.0)) == {}
    told = answer_headers(RequestMetrics(0.0, predicted_ttft_s=0.25, predicted_e2e_s=2.0, missed=("e2e",)))
    assert told == {
        "X-Predicted-TTFT-Ms": "250.0", "X-Predicted-E2E-Ms": "2000.0", "X-Predicted-Misses": "e2e",
    }  # fmt: skip


@pytest.fixture(scope="module", params=["deadline", "fcfs"])
def served(request: pytest.FixtureRequest) -> Any:
    with RunningServer(policy=request.param, service={"ttft_s": 30.0}) as running:
        # Nothing is predicted before some steps have been seen.
        body = {"model": "base", "prompt": "hello", "max_tokens": 32, "ignore_eos": True}
        first = running.client.post("/v1/completions", json=body)
        assert first.status_code == 200, first.text
        assert "X-Predicted-TTFT-Ms" not in first.headers
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_told_its_forecast_and_is_counted(served: RunningServer, stream: bool) -> None:
    before = served.run(served.llm.stats()).deadlines
    body = {"model": "base", "prompt": "hello", "max_tokens": 4, "stream": stream, "ignore_eos": True,
            "deadlines": {"ttft_ms": 20_000, "e2e_ms": 0.01}}  # fmt: skip
    answer = served.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert float(answer.headers["X-Predicted-TTFT-Ms"]) >= 0
    assert answer.headers["X-Predicted-Misses"] == "e2e"
    after = served.run(served.llm.stats()).deadlines
    assert after.ttft_met == before.ttft_met + 1
    assert after.e2e_missed == before.e2e_missed + 1
