"""The gate before every route: request ids, Host and Origin, keys.

A request without a valid key never reaches a route, whichever it is; only liveness is open to all.
"""

from __future__ import annotations

import re
import uuid
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polybatch.server.auth import Caller, Keys
from polybatch.server.body_budget import BodyBudget, BodyLease
from polybatch.server.browsers import browser_caller, is_for_browsers
from polybatch.server.config import ServerConfig
from polybatch.server.errors import HttpError, error_response
from polybatch.server.key_file import Role

OPEN_PATHS = frozenset(("/health",))
WATCHED_PATHS = ("/metrics", "/ready")
"""What a metrics key opens."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_LOCAL_HOSTS = frozenset(("localhost", "127.0.0.1", "::1"))


class Gate:
    """ASGI middleware. Puts `request_id`, `caller` and `body`, the memory it may take, into the request's
    state."""

    def __init__(self, app: ASGIApp, config: ServerConfig, keys: Keys) -> None:
        self._app, self._keys = app, keys
        self._bodies = BodyBudget(config.max_buffered_bytes)
        self._hosts: frozenset[str] | None = None
        if keys.is_open and config.is_local:
            # A web page could otherwise reach a server without keys under a host name of its own.
            self._hosts = _LOCAL_HOSTS | frozenset(host.lower() for host in config.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        is_valid_id = REQUEST_ID.fullmatch(request_id) is not None
        state = scope.setdefault("state", {})
        state["request_id"] = request_id if is_valid_id else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A route may have found another id in the body.
                MutableHeaders(scope=message)["X-Request-Id"] = state["request_id"]
            await send(message)

        async def receive_noting() -> Message:
            message = await receive()
            state["is_body_read"] = not message.get("more_body", False)
            return message

        try:
            state["caller"] = self._admit(scope["path"], headers)
        except HttpError as error:
            await error_response(error)(scope, receive_noting, send_with_id)
            return
        state["body"] = body = BodyLease(self._bodies)
        try:
            await self._app(scope, receive_noting, send_with_id)
        finally:
            body.release()

    def _admit(self, path: str, headers: Headers) -> Caller:
        if self._hosts is not None:
            host = _host_of(headers.get("host", ""))
            if host not in self._hosts:
                raise HttpError(
                    403,
                    f"Host is {host[:100]!r}; this server without keys answers to localhost only: "
                    "start it with --allowed-host or --api-key",
                    kind="permission_error",
                )
            origin = headers.get("origin")
            if origin is not None and _host_of(urlsplit(origin).netloc) not in self._hosts:
                raise HttpError(403, f"Origin {origin[:100]!r} may not call", kind="permission_error")
        if path in OPEN_PATHS:
            return Caller()
        authorization = headers.get("authorization")
        if is_for_browsers(path):
            caller = browser_caller(self._keys, authorization)
        else:
            caller = self._keys.caller_of(authorization)
        if caller.role is Role.METRICS and path not in WATCHED_PATHS:
            raise HttpError(
                403, f"this key is for {' and '.join(WATCHED_PATHS)} alone", kind="permission_error"
            )
        return caller


def _host_of(netloc: str) -> str:
    """Name of `name:port` or `[address]:port`, lower case."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0].lower()
    return netloc.partition(":")[0].lower()
