"""A streaming client that costs next to nothing, so that a load generator may share the server's machine.

One thread, epoll, raw sockets: what arrives is stamped and searched for events, and no JSON is parsed but
that of a stream's last chunk.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

EVENT = b"\ndata: {"
DONE = b"data: [DONE]"
END = b"\r\n0\r\n\r\n"
RECEIVE_BYTES = 1 << 16


class LoadFailedError(Exception):
    """An answer is not what a load test can count."""


@dataclass(slots=True)
class Stream:
    """One request. Times from `time.perf_counter`; stamps: of each event that has something to say."""

    head: bytes
    sent_s: float = 0.0
    stamps: list[float] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    seen: int = 0
    num_tokens: int = 0

    @property
    def ttft_s(self) -> float:
        return self.stamps[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None for a single one."""
        if self.num_tokens < 2:
            return None
        return (self.stamps[-1] - self.stamps[0]) / (self.num_tokens - 1)

    def gaps_s(self) -> list[float]:
        """Between events that arrived apart."""
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Load:
    """What came of one run. processor_s: of this client, all of it."""

    total_s: float
    processor_s: float
    streams: Sequence[Stream]

    @property
    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self.streams)


def completion(model: str, token_ids: Sequence[int], max_tokens: int) -> bytes:
    """A streamed greedy completion of forced length as HTTP bytes; its last chunk has the usage."""
    body = json.dumps(
        {
            "model": model, "prompt": list(token_ids), "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def run(port: int, requests: Sequence[bytes], concurrency: int) -> Load:
    """Send all requests, so many at a time, each on a connection that is kept open.

    Raises LoadFailedError for any answer but a whole stream.
    """
    todo = iter([Stream(request) for request in requests])
    finished: list[Stream] = []
    sockets: list[socket.socket] = []
    started_cpu = time.process_time()
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(min(concurrency, len(requests))):
                sock = socket.create_connection(("127.0.0.1", port))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sockets.append(sock)
            started_s = time.perf_counter()
            for sock in sockets:
                selector.register(sock, selectors.EVENT_READ, _send(sock, next(todo)))
            while selector.get_map():
                for key, _ in selector.select(60):
                    sock, stream = _socket(key), key.data
                    if not _take(stream, sock.recv(RECEIVE_BYTES), time.perf_counter()):
                        continue
                    finished.append(stream)
                    following = next(todo, None)
                    if following is None:
                        selector.unregister(sock)
                    else:
                        selector.modify(sock, selectors.EVENT_READ, _send(sock, following))
            total_s = time.perf_counter() - started_s
        finally:
            for sock in sockets:
                sock.close()
    for stream in finished:
        _settle(stream)
    return Load(total_s, time.process_time() - started_cpu, finished)


def replay(port: int, arrivals: Sequence[tuple[float, bytes]]) -> Load:
    """Send requests at their times, in seconds from the start, whatever is still under way (an open loop).

    Raises LoadFailedError for any answer but a whole stream.
    """
    todo = list(reversed(arrivals))
    idle: list[socket.socket] = []
    finished: list[Stream] = []
    started_cpu, started_s = time.process_time(), time.perf_counter()
    with selectors.DefaultSelector() as selector:
        try:
            while todo or selector.get_map():
                now = time.perf_counter() - started_s
                while todo and todo[-1][0] <= now:
                    sock = idle.pop() if idle else socket.create_connection(("127.0.0.1", port))
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    selector.register(sock, selectors.EVENT_READ, _send(sock, Stream(todo.pop()[1])))
                for key, _ in selector.select(max(0.0, todo[-1][0] - now) if todo else 60):
                    sock, stream = _socket(key), key.data
                    if _take(stream, sock.recv(RECEIVE_BYTES), time.perf_counter()):
                        finished.append(stream)
                        selector.unregister(sock)
                        idle.append(sock)
            total_s = time.perf_counter() - started_s
        finally:
            for sock in [*idle, *map(_socket, selector.get_map().values())]:
                sock.close()
    for stream in finished:
        _settle(stream)
    return Load(total_s, time.process_time() - started_cpu, finished)


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


def _send(sock: socket.socket, stream: Stream) -> Stream:
    stream.sent_s = time.perf_counter()
    sock.sendall(stream.head)
    return stream


def _take(stream: Stream, piece: bytes, now: float) -> bool:
    """Stamp the events that a piece completes; whether the stream is over."""
    if not piece:
        raise LoadFailedError(f"the server closed the connection; last came {bytes(stream.data[-300:])!r}")
    data = stream.data
    data += piece
    found = data.count(EVENT, stream.seen)
    if found:
        stream.stamps += [now] * found
        stream.seen = data.rindex(EVENT) + 1
    return data.endswith(END)


def _settle(stream: Stream) -> None:
    """Check what came and read its usage; its stamp is of no token and goes."""
    data = bytes(stream.data)
    if not data.startswith(b"HTTP/1.1 200 ") or DONE not in data:
        raise LoadFailedError(f"an answer is no whole stream: {data[-500:]!r}")
    last: dict[str, Any] = json.loads(data[data.rindex(EVENT) + len(EVENT) - 1 :].split(b"\n\n", 1)[0])
    if not last.get("usage"):
        raise LoadFailedError(f"a stream ended without usage: {last}")
    stream.num_tokens = last["usage"]["completion_tokens"]
    stream.stamps.pop()
    stream.data = bytearray()
