"""HTTP/1.1 as uvicorn speaks it, with limits on headers, which its fast parser has none of."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 << 10
HEADER_TIMEOUT_S = 30.0

_REFUSAL = (
    b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


class LimitedProtocol(HttpToolsProtocol):
    """Closes connections whose headers are too large (431) or too slow (408), before they take memory.

    max_connections: more are turned away (503).
    """

    max_connections: int | None = None
    _num_header_bytes = 0
    _num_field_bytes = 0
    _is_in_headers = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            self._refuse(b"503 Service Unavailable", f"more than {self.max_connections:,} connections")
            return
        self._timer = self.loop.call_later(
            HEADER_TIMEOUT_S, self._refuse, b"408 Request Timeout", "slow headers"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_headers:
            self._num_header_bytes += len(data)
        super().data_received(data)
        if self._is_in_headers and self._num_header_bytes > MAX_HEADER_BYTES:
            self._refuse_headers()

    def on_message_begin(self) -> None:
        self._is_in_headers, self._num_header_bytes, self._num_field_bytes = True, 0, 0
        if self._timer is None:
            self._timer = self.loop.call_later(
                HEADER_TIMEOUT_S, self._refuse, b"408 Request Timeout", "slow headers"
            )
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_field_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._stop_timer()
        if self._num_field_bytes > MAX_HEADER_BYTES:
            # They may have come whole in one piece.
            self._refuse_headers()
            raise ValueError("headers are too large")
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn does when parsing fails; whoever was refused has had an answer."""
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def _refuse_headers(self) -> None:
        self._refuse(b"431 Request Header Fields Too Large", f"headers exceed {MAX_HEADER_BYTES:,} bytes")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: bytes, message: str) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        body = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":null}}'
        body = body % message.encode()
        self.transport.write(_REFUSAL % (status, len(body), body))
        self.transport.close()


def limited_to(max_connections: int) -> type[LimitedProtocol]:
    """The protocol with a limit on open connections; uvicorn makes one object per connection."""
    return type("LimitedProtocol", (LimitedProtocol,), {"max_connections": max_connections})
