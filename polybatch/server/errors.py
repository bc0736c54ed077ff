"""Errors on HTTP: a status, OpenAI's error object, and what else the client should know."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from polybatch.engine.async_llm import EngineDownError
from polybatch.errors import ConfigError, DeadlineError, PolybatchError, RequestError
from polybatch.jobs.responses import error_body

logger = logging.getLogger("polybatch.server")

CLIENT_GONE_STATUS = 499
"""Nobody sees it; nginx's number for a client that closed the connection, for the log."""

RETRY_AFTER_DOWN_S = 5
LINGER_S = 10.0
"""That the rest of a refused body is read and thrown away: who still sends when the connection is closed sees
a reset instead of the answer."""


class HttpError(PolybatchError):
    """An answer other than success. kind, param, code: OpenAI's `type`, `param` and `code`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return error_body(str(self), kind=self.kind, param=self.param, code=self.code)


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer."""


def unavailable(message: str, code: str, retry_after_s: int = RETRY_AFTER_DOWN_S) -> HttpError:
    """503: not now, but later."""
    return HttpError(
        503, message, kind="server_error", code=code, headers={"Retry-After": str(retry_after_s)}
    )


def busy(message: str, retry_after_s: int, code: str = "queue_full") -> HttpError:
    """429: too much at once."""
    return HttpError(
        429, f"the server is busy: {message}", kind="rate_limit_error", code=code,
        headers={"Retry-After": str(retry_after_s)},
    )  # fmt: skip


def as_http(error: Exception) -> HttpError:
    """What a client is told of an error; of one that nobody foresaw, only that it happened."""
    match error:
        case HttpError():
            return error
        case DeadlineError():
            return busy(str(error), max(1, round(error.wait_s)), "deadline_unattainable")
        case RequestError():
            return HttpError(400, str(error), param=error.field)
        case ConfigError():
            return HttpError(400, str(error))
        case EngineDownError():
            return unavailable(str(error), "engine_down")
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return _disk_full()
        case sqlite3.Error(sqlite_errorcode=sqlite3.SQLITE_FULL):
            return _disk_full()
        case PolybatchError():
            return HttpError(500, str(error), kind="server_error", code="engine_error")
        case _:
            return HttpError(500, "internal error; the server's log has it", kind="server_error")


def _disk_full() -> HttpError:
    return HttpError(
        507, "the server's disk is full: delete files, or tell its operator", kind="server_error",
        code="disk_full",
    )  # fmt: skip


class Refusal(Response):
    """An answer that may come before the request's body has been read."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_linger(message: Message) -> None:
            if message["type"] != "http.response.body" or scope["state"].get("is_body_read"):
                await send(message)
                return
            await send({**message, "more_body": True})
            try:
                async with asyncio.timeout(LINGER_S):
                    while (await receive()).get("more_body", False):
                        pass
            except TimeoutError:
                logger.info("%s %s: more of a refused body came for too long", scope["method"], scope["path"])
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await super().__call__(scope, receive, send_and_linger)


def error_response(error: HttpError) -> Response:
    return Refusal(
        msgspec.json.encode(error.body), error.status, error.headers, media_type="application/json"
    )


def install_handlers(app: FastAPI) -> None:
    """Have every error answered in the same form."""

    async def known(request: Request, error: Exception) -> Response:
        found = as_http(error)
        if found.status == 500:
            trace = error if isinstance(error, (OSError, sqlite3.Error)) else None
            logger.error("%s %s: %s", request.method, request.url.path, error, exc_info=trace)
        return error_response(found)

    async def from_starlette(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"
        message = {404: f"there is no {what}", 405: f"{what} is not allowed"}.get(
            error.status_code, str(error.detail)
        )
        return error_response(HttpError(error.status_code, message, headers=error.headers))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    app.add_exception_handler(PolybatchError, known)
    app.add_exception_handler(HTTPException, from_starlette)
    app.add_exception_handler(ClientGoneError, gone)
    app.add_exception_handler(OSError, known)
    app.add_exception_handler(sqlite3.Error, known)
    app.add_exception_handler(Exception, known)
