"""Request bodies: read with a limit on size and time, decoded as JSON."""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect

from polybatch.errors import RequestError
from polybatch.server.config import ServerConfig
from polybatch.server.errors import ClientGoneError, HttpError

T = TypeVar("T")

_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*+"|[][{}]', re.DOTALL)
_QUOTED = re.compile(r"`\$?\.?([^`]+)`")


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """The whole body. Raises HttpError 413 if it is too large, 408 if it takes too long, 429 if memory is
    short, RequestError if it nests too deeply.
    """
    limit = config.max_body_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for piece in request.stream():
                request.state.body.take(len(piece))
                body += piece
                if len(body) > limit:
                    raise _too_large(limit)
    except TimeoutError:
        raise HttpError(
            408,
            f"the body did not arrive within {config.body_timeout_s:g} s",
            headers={"Connection": "close"},
        ) from None
    except ClientDisconnect as error:
        raise ClientGoneError from error
    check_depth(bytes(body), config.max_json_depth)
    return bytes(body)


def check_depth(data: bytes, limit: int) -> None:
    """Raise RequestError for JSON whose arrays and objects nest deeper, before anything walks down there."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data):
        match match[0]:
            case b"[" | b"{":
                depth += 1
                if depth > limit:
                    raise RequestError(
                        f"body nests arrays and objects more than {limit} deep: flatten it", field="body"
                    )
            case b"]" | b"}":
                depth -= 1


def _too_large(limit: int) -> HttpError:
    return HttpError(
        413, f"the body is larger than {limit:,} bytes: split the request", headers={"Connection": "close"}
    )


def decode_object(data: bytes) -> dict[str, Any]:
    """A JSON object, its values unchecked. Raises RequestError naming `body`."""
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"body is not valid JSON: {error}", field="body") from error
    if not isinstance(value, dict):
        raise RequestError(f"body is {type(value).__name__}; it must be an object", field="body")
    return value


def decode_as(data: bytes, kind: type[T]) -> T:
    """A JSON body as a struct. Raises RequestError naming the field that is wrong."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        quoted = _QUOTED.findall(str(error))
        raise RequestError(str(error), field=quoted[-1] if quoted else "body") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"body is not valid JSON: {error}", field="body") from error
