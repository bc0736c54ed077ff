"""Thousands of requests that are wrong somewhere, from the first byte of HTTP to the last field of a body."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from server_helpers import RunningServer
from test_faults import wait_all_free

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "base", "prompt": "hi", "max_tokens": 3, "stop": ["x"], "stream": True}),
    ("/v1/completions", {"model": "red", "prompt": [[1, 2], [3]], "max_tokens": 2, "logprobs": 1, "n": 2}),
    ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "x"}],
     "max_tokens": 2}),
    ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": [{"type": "text",
     "text": "x"}]}], "max_tokens": 2, "response_format": {"type": "json_object"}, "seed": 1}),
    ("/tokenize", {"prompt": "abc", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/tmp"}),
    ("/v1/batches", {"input_file_id": "file-1", "endpoint": "/v1/completions", "metadata": {"a": "b"}}),
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, -0.0, 1e308, 0.5, "", "x", "\x00", "\ud800", "é" * 300,
    [], [[]], [None], {}, {"a": {}}, {"": ""}, [1] * 50, "a" * 5000, [{"role": "user"}],
    {"type": "json_schema"},
]  # fmt: skip
PATHS = ["/v1/files", "/v1/files/x/content", "/v1/batches", "/v1/models", "/v1/models/red", "/ready",
         "/metrics", "/version", "/dashboard", "/dashboard/data", "/openapi.json", "/health", "/",
         ]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "get"]
JUNK = bytes(range(256))


def request(method: str, target: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("utf-8", "surrogateescape") + b"\r\n\r\n" + body


def scrambled(rng: random.Random, data: bytes) -> bytes:
    """With some bytes changed, left out, put in or repeated."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) or 1)
        what = rng.randrange(4)
        if what == 0 and changed:
            changed[at] = rng.choice(JUNK)
        elif what == 1:
            del changed[at : at + rng.randint(1, 8)]
        elif what == 2:
            changed[at:at] = bytes(rng.choices(JUNK, k=rng.randint(1, 8)))
        else:
            changed[at:at] = changed[at : at + rng.randint(1, 30)]
    return bytes(changed)


def broken_json(rng: random.Random) -> bytes:
    path, body = rng.choice(BODIES)
    return request("POST", path, scrambled(rng, json.dumps(body).encode()))


def wrong_values(rng: random.Random) -> bytes:
    path, body = rng.choice(BODIES)
    body = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        spot: Any = body
        while isinstance(spot, (dict, list)) and spot:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            key = rng.choice(keys)
            if not isinstance(spot[key], (dict, list)) or not spot[key] or rng.random() < 0.5:
                spot[key] = copy.deepcopy(rng.choice(VALUES))
                break
            spot = spot[key]
    return request("POST", path, json.dumps(body).encode())


def strange_target(rng: random.Random) -> bytes:
    name = "".join(
        chr(rng.choice((0, 9, 37, 46, 47, 63, 65, 127, 233, 0x1F600))) for _ in range(rng.randint(1, 20))
    )
    target = (
        rng.choice(PATHS)
        + rng.choice(("", "/", "?limit=", "?after=", "/../", "%00", "?", "//"))
        + quote(name)
    )
    return request(rng.choice(METHODS), target, rng.choice((b"", b"{}", b"x" * 100)))


def strange_headers(rng: random.Random) -> bytes:
    path, body = rng.choice(BODIES)
    value = bytes(rng.choices(JUNK[32:127] + JUNK[160:], k=rng.randint(0, 60))).decode("latin-1")
    name = rng.choice(("Authorization", "Content-Type", "X-Request-Id", "Accept", "traceparent", "Origin",
                       "Content-Encoding", "Cookie", "Expect", "Upgrade",
                       "X-" + "y" * rng.randint(1, 5000)))  # fmt: skip
    return request("POST", path, json.dumps(body).encode(), f"{name}: {value}")


def broken_form(rng: random.Random) -> bytes:
    form = (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b\r\nContent-Disposition: '
        b'form-data; name="file"; filename="a.jsonl"\r\nContent-Type: text/plain\r\n\r\n{}\n\r\n--b--\r\n'
    )
    kind = rng.choice(
        ("multipart/form-data; boundary=b", "multipart/form-data", "multipart/mixed; boundary=b")
    )
    return request("POST", "/v1/files", scrambled(rng, form), f"Content-Type: {kind}")


def broken_http(rng: random.Random) -> bytes:
    """Not HTTP, or HTTP that contradicts itself; all of it over once it is sent."""
    path, body = rng.choice(BODIES)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode()
    return rng.choice(
        (
            bytes(rng.choices(JUNK, k=rng.randint(30, 200))) + b"\r\n\r\n",
            head + b"Content-Length: -1\r\n\r\n" + data,
            head + b"Content-Length: 1e3\r\n\r\n" + data,
            head + b"Content-Length: %d\r\nContent-Length: 3\r\n\r\n" % len(data) + data,
            head + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n" + data + b"\r\n0\r\n\r\n",
            head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(data) + data + b"0\r\n\r\n",
            head.replace(b"HTTP/1.1", b"HTTP/9.9") + b"\r\n",
            head.replace(b"POST ", b"POST") + b"\r\n",
            head + b"No colon\r\n\r\n",
            head + b"A: b\x00c\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(rng.choices(JUNK, k=60)) + b"\r\n\r\n",
        )
    )


def cut_short(rng: random.Random) -> bytes:
    """The client goes away in the middle."""
    path, body = rng.choice(BODIES)
    whole = request("POST", path, json.dumps(body).encode())
    return whole[: rng.randrange(1, len(whole))]


KINDS: tuple[Callable[[random.Random], bytes], ...] = (
    broken_json, wrong_values, strange_target, strange_headers, broken_form, broken_http, cut_short,
)  # fmt: skip


def exchange(address: tuple[str, int], data: bytes, *, is_cut: bool) -> bytes:
    with socket.create_connection(address, timeout=30) as sock:
        try:
            sock.sendall(data)
            answer = b""
            while not is_cut and (piece := sock.recv(65_536)):
                answer += piece
        except ConnectionError:
            # It had heard enough.
            pass
        return answer


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("count", [700, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests_are_refused_and_leave_nothing_behind(tmp_path: Path, count: int) -> None:
    with RunningServer(
        adapters={"red": "red"}, config={"data_dir": tmp_path, "max_body_bytes": 4000}
    ) as server:
        host, port = server.url.removeprefix("http://").split(":")

        def send(number: int) -> tuple[str, str]:
            rng, kind = random.Random(number), KINDS[number % len(KINDS)]
            data = kind(rng)
            answer = exchange((host, int(port)), data, is_cut=kind is cut_short)
            found = re.match(rb"HTTP/1\.1 ([1-4]\d\d) ", answer)
            is_silent = kind is cut_short or (kind is broken_http and not answer)
            assert found or is_silent, (data, answer)
            return kind.__name__, found[1].decode() if found else "none"

        with ThreadPoolExecutor(8) as clients:
            seen = Counter(clients.map(send, range(count // 2)))
            before, descriptors = rss_bytes(), len(os.listdir("/proc/self/fd"))
            seen += Counter(clients.map(send, range(count // 2, count)))
        assert sum(seen.values()) == count
        for kind in KINDS[:-1]:
            refused = sum(
                number
                for (name, status), number in seen.items()
                if name == kind.__name__ and status[0] == "4"
            )
            assert refused > count / len(KINDS) / 4, (kind.__name__, seen)
        server.until_idle()
        wait_all_free(server)
        assert server.llm.num_restarts == 0
        assert server.complete(max_tokens=3).status_code == 200
        assert rss_bytes() - before < 50 << 20
        assert len(os.listdir("/proc/self/fd")) < descriptors + 20
        assert not list((tmp_path / "work").iterdir())
