"""What a server may say to a row, and what becomes of the row."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from job_helpers import completion_line

from polybatch.errors import ConfigError, EngineError
from polybatch.jobs import remote
from polybatch.jobs.lines import Line
from polybatch.jobs.remote import RemoteAnswerer, server_url
from polybatch.jobs.rows import Answer

GOOD = httpx.Response(200, json={"object": "text_completion", "choices": []})
REFUSED = {"error": {"message": "n asks for 99", "type": "invalid_request_error", "code": "too_many"}}


@pytest.fixture(autouse=True)
def _in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(remote, "MAX_WAIT_S", 0.002)


def ask(
    *said: httpx.Response | Exception, line: bytes | None = None, patience_s: float = 60.0
) -> tuple[Answer, int]:
    """The answer of a row to whose requests a server says these things in turn; and how many were made."""
    rest = list(said)

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/v1/completions"
        found = rest.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    async def run() -> Answer:
        transport = httpx.MockTransport(handler)
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as client:
            return await RemoteAnswerer(client, patience_s)(
                Line(7, line or completion_line("r", "x").encode())
            )

    return asyncio.run(run()), len(said) - len(rest)


def test_an_answer_is_kept_as_it_came() -> None:
    answer, _ = ask(GOOD)
    assert (answer.status, answer.body, answer.model) == (200, GOOD.json(), "base")
    assert answer.summary is None


@pytest.mark.parametrize(
    "later",
    [
        httpx.Response(429, json=REFUSED, headers={"Retry-After": "1"}),
        httpx.Response(503, json=REFUSED),
        httpx.Response(502, text="<html>bad gateway</html>"),
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.Response(500, json=REFUSED),
        httpx.Response(200, text="not json"),
    ],
)
def test_what_may_pass_is_tried_again(later: httpx.Response | Exception) -> None:
    answer, count = ask(later, later, GOOD)
    assert (answer.status, count) == (200, 3)


def test_a_server_that_is_away_is_told_of_once_until_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    away = httpx.ConnectError("refused")
    ask(away, away, httpx.Response(500, json=REFUSED), away, GOOD)
    told = ["http://server does not answer (ConnectError refused): trying again for 60 s"] * 2
    assert [record.getMessage() for record in caplog.records] == told


def test_a_refusal_is_an_error_line_at_once() -> None:
    answer, count = ask(httpx.Response(400, json=REFUSED))
    assert (answer.status, answer.body, count) == (400, REFUSED, 1)
    assert answer.summary == {"code": "too_many", "message": "line 7: n asks for 99"}


def test_a_refusal_that_names_a_field_is_about_the_row_alone() -> None:
    refusal = {"error": {"message": "adapter 'x' is not for this key", "param": "model", "code": None}}
    answer, _ = ask(httpx.Response(403, json=refusal))
    assert answer.status == 403


def test_a_row_that_always_fails_the_server_is_an_error_line() -> None:
    answer, count = ask(*[httpx.Response(500, text="oops")] * 5)
    assert (answer.status, count) == (500, remote.MAX_SERVER_ERRORS)
    assert answer.summary is not None
    assert answer.summary["code"] == "server_error"


@pytest.mark.parametrize(
    "line", [b"{", b'{"custom_id": "a"}', completion_line("r", "x", stream=True).encode()]
)
def test_a_line_that_cannot_be_sent_is_not(line: bytes) -> None:
    answer, count = ask(line=line)
    assert (answer.status, count) == (400, 0)


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        (httpx.Response(401, json=REFUSED), ConfigError, "--api-key"),
        (httpx.Response(403, json=REFUSED), ConfigError, "--api-key"),
        (httpx.Response(404, text="nothing here"), ConfigError, "check --server"),
        (httpx.ConnectError("refused"), EngineError, "run the same command again"),
        (httpx.Response(503, json=REFUSED), EngineError, "run the same command again"),
    ],
)
def test_what_no_row_can_help_ends_the_run(
    said: httpx.Response | Exception, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        ask(*[said] * 100, patience_s=0.0)


def test_a_busy_server_is_waited_for_without_limit() -> None:
    answer, _ = ask(*[httpx.Response(429, json=REFUSED)] * 20, GOOD, patience_s=0.0)
    assert answer.status == 200


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_may_end_in_v1(url: str) -> None:
    assert server_url(url) == "http://h:1"


@pytest.mark.parametrize("url", ["h:1", "ftp://h", "http://", "http://h:x"])
def test_what_is_no_address_is_refused(url: str) -> None:
    check: Callable[[str], str] = server_url
    with pytest.raises(ConfigError, match="--server"):
        check(url)
