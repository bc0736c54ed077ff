"""Every cap, each with the answer that a client gets."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from server_helpers import RunningServer

from polybatch.errors import RequestError
from polybatch.server import protocol
from polybatch.server.bodies import check_depth
from polybatch.server.config import ServerConfig

CONFIG = ServerConfig(served_model_names=("base",))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": CONFIG.max_n + 1}, "n"),
        ({"logprobs": CONFIG.max_logprobs + 1}, "logprobs"),
        ({"prompt_logprobs": CONFIG.max_logprobs + 1}, "prompt_logprobs"),
        ({"stop": ["x"] * (CONFIG.max_stop_strings + 1)}, "stop"),
        ({"stop": "x" * (CONFIG.max_stop_chars + 1)}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(CONFIG.max_token_ids + 1)}}, "logit_bias"),
        ({"stop_token_ids": [1] * (CONFIG.max_token_ids + 1)}, "stop_token_ids"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": "x" * 1000}, "prompt"),
        ({"prompt": "x" * 200_000}, "prompt"),
        ({"prompt": [1] * 1000}, "prompt"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"lora": [{"id": "red"}] * 9}, "lora"),
    ],
)
def test_what_is_over_a_cap_is_refused_by_name(
    server: RunningServer, change: dict[str, Any], param: str
) -> None:
    response = server.complete(**change)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert any(character.isdigit() for character in error["message"]), "the limit is not said"


def test_what_is_just_within_the_caps_is_served(server: RunningServer) -> None:
    response = server.complete(
        n=2, stop=["x" * CONFIG.max_stop_chars] * CONFIG.max_stop_strings, max_tokens=2,
        logprobs=CONFIG.max_logprobs,
    )  # fmt: skip
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [65, 100_000])
def test_deep_json_is_refused_before_it_is_decoded(server: RunningServer, opening: str, depth: int) -> None:
    closing = {"[": "]"}.get(opening, "}")
    body = f'{{"model": "base", "prompt": "x", "metadata": {opening * depth}1{closing * depth}}}'
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        response = server.client.post(path, content=body.encode())
        assert response.status_code == 400
        assert "deep" in response.json()["error"]["message"]


def test_depth_counts_brackets_outside_of_strings_only() -> None:
    check_depth(json.dumps({"a": ["[{" * 100, '"[' * 100, "\\"]}).encode(), 3)
    check_depth(json.dumps([[1]] * 1000).encode(), 2)
    for text in ("[[[", '["]", [["', '[[{"a\\"": 1}]]'):
        with pytest.raises(RequestError):
            check_depth(text.encode(), 2)
    check_depth(b"[" * 10, 10)
    check_depth(b'"' + b"\\" * 100_001 + b"[" * 500, 1000)


def test_bodies_under_way_are_bounded_in_bytes() -> None:
    config = {"max_buffered_bytes": 50_000}
    with RunningServer("stub:step_s=0.05", config=config) as server:
        big = {"model": "base", "prompt": "x", "max_tokens": 100, "user": "u" * 30_000, "ignore_eos": True,
               "stream": True}  # fmt: skip
        with server.client.stream("POST", "/v1/completions", json=big) as first:
            assert first.status_code == 200
            response = server.complete(user="u" * 30_000)
            assert response.status_code == 429
            assert response.json()["error"]["code"] == "queue_full"
            assert response.headers["retry-after"] == "1"
            assert server.complete(max_tokens=1).status_code == 200
        server.until_idle()
        for _ in range(100):
            response = server.complete(user="u" * 30_000, max_tokens=1)
            if response.status_code == 200:
                break
            time.sleep(0.05)
        assert response.status_code == 200, "memory of an answered request was not given back"


def test_more_connections_than_allowed_are_turned_away() -> None:
    with RunningServer(config={"max_connections": 3}) as server:
        address = server.server.servers[0].sockets[0].getsockname()
        held = [socket.create_connection(address) for _ in range(3)]
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        with socket.create_connection(address) as late:
            answer = late.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"more than 3 connections" in answer
        held.pop().close()
        for _ in range(100):
            with socket.create_connection(address) as again:
                again.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = again.recv(4096)
            if answer.startswith(b"HTTP/1.1 200"):
                break
            time.sleep(0.02)
        assert answer.startswith(b"HTTP/1.1 200")
        for connection in held:
            connection.close()


def test_a_client_that_dawdles_over_its_headers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_TIMEOUT_S", 0.3)
    with RunningServer() as server:
        address = server.server.servers[0].sockets[0].getsockname()
        for begin in (b"", b"GET /health HTTP/1.1\r\nHost: loc"):
            with socket.create_connection(address) as slow:
                slow.settimeout(20)
                slow.sendall(begin)
                assert slow.recv(4096).startswith(b"HTTP/1.1 408")
                assert slow.recv(4096) == b""


def test_a_client_that_dawdles_over_its_body_is_cut_off() -> None:
    with RunningServer(config={"body_timeout_s": 0.3}) as server:
        address = server.server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address) as slow:
            slow.settimeout(20)
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            answer = slow.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"0.3 s" in answer


def test_a_large_header_is_cut_off(server: RunningServer) -> None:
    response = server.client.get("/health", headers={"X-Large": "x" * (protocol.MAX_HEADER_BYTES + 1)})
    assert response.status_code == 431
