"""What is wrong is refused in one form, with the field named; nothing hostile gets further than the edge."""

from __future__ import annotations

import random
import socket
import string
from typing import Any

import pytest
from server_helpers import RunningServer

GOOD: dict[str, Any] = {"model": "base", "prompt": "hi", "max_tokens": 2}
GOOD_CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}


def check_error(response: Any, status: int, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param, error
    return error


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokns": 3}, "max_tokns"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [9999]}, "prompt"),
        ({"prompt": "x" * 1000}, "prompt"),
        ({"prompt": "x" * 200_000}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"n": 33}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what"),
        ({"priority": 1}, "priority"),
        ({"priority": 2**40}, "priority"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
        ({"request_id": "two words"}, "request_id"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"adapter_id": 3}, "adapter_id"),
        ({"adapter_id": "green"}, "adapter_id"),
        ({"lora": [{"id": "red", "scale": "0.5"}]}, "lora[0].scale"),
        ({"lora": [{"id": "red"}, {"id": "blue", "scale": 101}]}, "lora[1].scale"),
        ({"lora": [{"id": "red"}, {"id": "red"}]}, "lora"),
        ({"lora": [{"id": "red"}] * 9}, "lora"),
        ({"lora": [{"id": "red"}, {"id": "green"}]}, "lora"),
        ({"adapter_id": "red", "lora": [{"id": "red", "scale": 0.5}]}, "lora"),
        ({"lora": ["red"]}, "lora[0]"),
        ({"model": "red", "adapter_id": "blue"}, "adapter_id"),
        ({"model": "base:green"}, "model"),
        ({"model": 7}, "model"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_a_bad_field_is_named(server: RunningServer, change: dict[str, Any], field: str) -> None:
    response = server.client.post("/v1/completions", json=GOOD | change)
    check_error(response, 400, field)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"x": {}}}, "chat_template_kwargs.x"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"echo": True}, "echo"),
    ],
)
def test_a_bad_field_of_a_chat_is_named(server: RunningServer, change: dict[str, Any], field: str) -> None:
    check_error(server.client.post("/v1/chat/completions", json=GOOD_CHAT | change), 400, field)


def test_an_unknown_model_is_not_found(server: RunningServer) -> None:
    error = check_error(server.client.post("/v1/completions", json=GOOD | {"model": "other"}), 404, "model")
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 50_000, b'{"n": 1e999}'],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_body_that_is_no_object_is_refused(server: RunningServer, path: str, body: bytes) -> None:
    check_error(server.client.post(path, content=body), 400)


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "nonsense": 3}, "nonsense"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [100_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]"),
    ],
)
def test_bad_token_bodies_name_their_field(
    server: RunningServer, path: str, body: dict[str, Any], field: str
) -> None:
    check_error(server.client.post(path, json=body), 400, field)


def test_unknown_paths_and_methods_are_errors_of_the_same_form(server: RunningServer) -> None:
    check_error(server.client.get("/v1/nothing"), 404)
    check_error(server.client.get("/v1/completions"), 405)


def test_the_openapi_document_names_every_route(server: RunningServer) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/ready", "/tokenize"} <= set(paths)


def test_a_large_body_is_refused_whether_announced_or_not() -> None:
    with RunningServer(config={"max_body_bytes": 1000}) as server:
        check_error(server.complete(prompt="x" * 2000), 413)
        pieces = iter([b"x" * 600] * 3)
        response = server.client.post("/v1/completions", content=pieces)
        check_error(response, 413)
        assert server.complete(max_tokens=2).status_code == 200


def raw(server: RunningServer, data: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        try:
            sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return sock.recv(4096)


def test_endless_headers_are_cut_off(server: RunningServer) -> None:
    answer = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"x" * 300_000)
    assert b" 431 " in answer.split(b"\r\n")[0]
    many = b"".join(b"X-%d: y\r\n" % i for i in range(30_000))
    answer = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + many)
    assert b" 431 " in answer.split(b"\r\n")[0]


def test_what_is_not_http_is_refused(server: RunningServer) -> None:
    assert b" 400 " in raw(server, b"\x16\x03\x01 not http at all\r\n\r\n").split(b"\r\n")[0]


def test_random_bodies_never_make_the_server_fail(server: RunningServer) -> None:
    random.seed(7)
    values: list[Any] = [None, True, -1, 0, 1, 10**30, 0.5, "", "x", [], [1], ["a"], {}, {"a": 1}, [[]], [{}]]
    names = [*GOOD, *GOOD_CHAT, "n", "stop", "logit_bias", "seed", "lora", "adapter_id", "echo", "logprobs",
             "top_logprobs", "stop_token_ids", "min_tokens", "stream", "stream_options"]  # fmt: skip
    seen = set()
    for _ in range(300):
        path, base = random.choice((("/v1/completions", GOOD), ("/v1/chat/completions", GOOD_CHAT)))
        body = base | {random.choice(names): random.choice(values) for _ in range(random.randint(1, 3))}
        if random.random() < 0.1:
            body["".join(random.choices(string.printable, k=5))] = 1
        response = server.client.post(path, json=body)
        assert response.status_code in (200, 400, 404), (body, response.text)
        seen.add(response.status_code)
    assert {200, 400} <= seen
    assert server.llm.num_in_flight == 0
