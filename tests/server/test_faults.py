"""Who dies, and what the others see."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import openai
import pytest
from server_helpers import FAST, RunningServer, events

LONG = {"max_tokens": 500, "ignore_eos": True}


@pytest.fixture(scope="module")
def slow() -> Iterator[RunningServer]:
    """Its steps take as long as a model's; tests may kill its engine."""
    watch = replace(FAST, max_restarts=100, max_backoff_s=0.1)
    config = {"send_timeout_s": 1.0}
    with RunningServer("stub:step_s=0.01", {"red": "red"}, watch=watch, config=config) as running:
        yield running


def kill_engine(server: RunningServer) -> None:
    assert server.llm.pid is not None
    os.kill(server.llm.pid, signal.SIGKILL)


def wait_until(condition: Callable[..., bool], what: str) -> None:
    """Fail after half a minute."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def wait_all_free(server: RunningServer) -> None:
    """Until the engine runs nothing and no page holds the KV of a sequence."""

    def is_free() -> bool:
        stats = server.run(server.llm.stats()).scheduler
        return stats.num_running == stats.num_waiting == stats.num_kv_pages == 0

    wait_until(is_free, "pages are still held")
    assert server.llm.num_in_flight == 0
    assert server.state.admission.num_running_seqs == server.state.admission.num_queued_seqs == 0


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back(slow: RunningServer) -> None:
    body = {"model": "red", "prompt": "hi", "stream": True, **LONG}
    with slow.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        kill_engine(slow)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"code":"engine_down"' in rest[-2]
    down = slow.client.get("/ready")
    assert down.status_code == 503
    assert "SIGKILL" in down.json()["reason"]
    assert int(down.headers["Retry-After"]) > 0
    assert slow.client.get("/health").status_code == 200
    refused = slow.complete()
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    slow.run(slow.llm.wait_ready())
    assert slow.client.get("/ready").status_code == 200
    assert slow.complete(model="red", max_tokens=2).status_code == 200
    wait_all_free(slow)


def test_the_official_client_raises_when_the_engine_dies(slow: RunningServer) -> None:
    stream = slow.openai.completions.create(
        model="base", prompt="x", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    kill_engine(slow)
    with pytest.raises(openai.APIError, match="restarted"):
        for _ in stream:
            pass
    slow.run(slow.llm.wait_ready())


def test_a_whole_answer_that_dies_is_a_503(slow: RunningServer) -> None:
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(slow.complete(**LONG)))
    asking.start()
    wait_until(lambda: slow.llm.num_in_flight == 1, "the request did not arrive")
    kill_engine(slow)
    asking.join()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "engine_down"
    slow.run(slow.llm.wait_ready())


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_pages(slow: RunningServer, is_streamed: bool, n: int) -> None:
    body = {"model": "base", "prompt": ["x" * 50] * n, "n": n, "stream": is_streamed, **LONG}
    if is_streamed:
        with slow.client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            stats = slow.run(slow.llm.stats()).scheduler
            assert stats.num_running + stats.num_waiting == n * n
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{slow.url}/v1/completions", json=body, timeout=0.3)
    wait_all_free(slow)


def test_a_client_that_leaves_while_it_waits_leaves_the_queue() -> None:
    with RunningServer("stub:step_s=0.01", max_num_seqs=1) as server:
        body = {"model": "base", "prompt": "x", "stream": True, **LONG}
        with server.client.stream("POST", "/v1/completions", json=body):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
            wait_until(lambda: server.llm.num_in_flight == 1, "the waiting request stayed")
            assert server.state.admission.num_queued_seqs == 0
        wait_all_free(server)


def test_a_client_that_does_not_read_is_let_go(slow: RunningServer) -> None:
    host, port = slow.url.removeprefix("http://").split(":")
    body = (
        b'{"model":"base","prompt":"x","n":16,"max_tokens":900,"ignore_eos":true,"stream":true,"logprobs":20}'
    )
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((host, int(port)))
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        sock.sendall(body)
        wait_until(lambda: slow.llm.num_in_flight == 1, "the request did not arrive")
        wait_all_free(slow)
    assert slow.complete(max_tokens=2).status_code == 200


def test_a_server_without_an_engine_ends_with_a_failure() -> None:
    with RunningServer(watch=replace(FAST, max_restarts=1)) as server:
        server.llm.model = "stub:nonsense=1"
        kill_engine(server)
        assert "nonsense" in server.run(server.llm.wait_failed())
        assert server.client.get("/ready").status_code == 503


@pytest.mark.slow
def test_twenty_kills_under_load_lose_no_client(slow: RunningServer) -> None:
    outcomes: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=slow.url, timeout=60) as client:
            while not is_over.is_set():
                body = {"model": "red", "prompt": "x", "stream": True, "max_tokens": 30}
                response = client.post("/v1/completions", json=body)
                if response.status_code == 503:
                    time.sleep(0.05)
                    continue
                assert response.status_code == 200
                last = events(response)[-1]
                outcomes.append("error" if "error" in last else "done")

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        slow.run(slow.llm.wait_ready())
        num_done = outcomes.count("done")
        wait_until(lambda before=num_done: outcomes.count("done") > before, "nothing is answered")
        kill_engine(slow)
        wait_until(lambda: not slow.llm.health().is_ready, "the kill went unnoticed")
    slow.run(slow.llm.wait_ready())
    is_over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a client hangs"
    assert {"error", "done"} <= set(outcomes)
    wait_all_free(slow)
