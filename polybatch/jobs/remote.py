"""Rows answered by a server over HTTP, any that speaks OpenAI's interface.

A body is sent as it stands. What says "later" (429, 502 to 504, no connection) is tried again until nothing
has been answered for a while; what says "never" becomes an error line; what no row can help (keys, a wrong
address) ends the run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import httpx
import msgspec

from polybatch.errors import ConfigError, EngineError, RequestError
from polybatch.jobs.lines import Line, parse_envelope
from polybatch.jobs.responses import error_body
from polybatch.jobs.rows import Answer, failure

PATIENCE_S = 300.0
"""Without a single answer, before a server is held to be gone."""

MAX_SERVER_ERRORS = 3
"""Answers with status 500 and the like until a row is given up."""

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 30.0
CONNECT_S = 10.0
ANSWER_S = 3_600.0
LATER = (429, 502, 503, 504)

logger = logging.getLogger("polybatch.jobs")


def client_of(url: str, api_key: str | None, num_connections: int) -> httpx.AsyncClient:
    """A client for a server's address, with or without /v1 at its end. Raises ConfigError."""
    limits = httpx.Limits(max_connections=num_connections, max_keepalive_connections=num_connections)
    timeout = httpx.Timeout(ANSWER_S, connect=CONNECT_S)
    return httpx.AsyncClient(
        base_url=server_url(url), headers=key_header(api_key), limits=limits, timeout=timeout
    )


def server_url(url: str) -> str:
    """The address without /v1. Raises ConfigError if it is none."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--server {url!r} is no address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"--server is {url!r}; it must be an address such as http://localhost:8000")
    return str(parsed).rstrip("/").removesuffix("/v1")


def key_header(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


class RemoteAnswerer:
    """Answers rows through a client that the caller closes."""

    def __init__(self, client: httpx.AsyncClient, patience_s: float = PATIENCE_S) -> None:
        self._client, self._patience_s = client, patience_s
        self._answered_s = time.monotonic()
        self._is_told = False

    async def __call__(self, line: Line) -> Answer:
        """Raises ConfigError or EngineError where it makes no sense to go on."""
        try:
            endpoint, body = parse_envelope(line)
            if isinstance(body, dict) and body.get("stream"):
                raise RequestError("stream is true; answers in a file are whole: remove it", field="stream")
        except RequestError as error:
            refusal = error_body(str(error), kind="invalid_request_error", param=error.field)
            return failure(line, 400, refusal, "invalid_request")
        num_errors, wait_s = 0, FIRST_WAIT_S
        while True:
            status, answer, told_s, reason = await self._post(endpoint.value, body)
            if status == 200:
                return Answer(200, answer, str(body.get("model")) if isinstance(body, dict) else "")
            is_later = status is None or status in LATER
            num_errors += not is_later
            if status is not None and not is_later and (status < 500 or num_errors >= MAX_SERVER_ERRORS):
                return failure(line, status, answer, "refused" if status < 500 else "server_error")
            if status != 429 and time.monotonic() - self._answered_s > self._patience_s:
                raise EngineError(
                    f"{self._client.base_url} has answered nothing for {self._patience_s:g} s ({reason}): "
                    "run the same command again to go on"
                )
            if status is None and not self._is_told:
                self._is_told = True
                logger.warning(
                    "%s does not answer (%s): trying again for %g s",
                    self._client.base_url, reason, self._patience_s,
                )  # fmt: skip
            await asyncio.sleep(max(wait_s, told_s))
            wait_s = min(2 * wait_s, MAX_WAIT_S)

    async def _post(self, path: str, body: Any) -> tuple[int | None, dict[str, Any], float, str]:
        """Status or None without an answer, its JSON object, seconds to wait, and what went wrong."""
        try:
            response = await self._client.post(
                path, content=msgspec.json.encode(body), headers={"Content-Type": "application/json"}
            )
        except httpx.TransportError as error:
            return None, {}, 0.0, f"{type(error).__name__} {error}".strip()
        status, found = response.status_code, _object(response)
        # A refusal that names a field is about this row.
        if status == 401 or (status == 403 and not _error(found).get("param")):
            raise ConfigError(f"{self._client.base_url} refuses the key: {_reason(found)}: give --api-key")
        if status in (404, 405) and (found is None or "error" not in found):
            raise ConfigError(f"{self._client.base_url} has no {path}: check --server")
        if status not in LATER:
            self._answered_s = time.monotonic()
            self._is_told = False
        told = response.headers.get("Retry-After", "")
        told_s = min(float(told), MAX_WAIT_S) if told.isdigit() else 0.0
        reason = f"status {status}: {_reason(found)}"
        if found is None:
            status = 500 if status < 400 else status
            found = error_body(reason, kind="server_error")
        return status, found, told_s, reason


def _object(response: httpx.Response) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(response.content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _error(body: dict[str, Any] | None) -> dict[str, Any]:
    error = (body or {}).get("error")
    return error if isinstance(error, dict) else {}


def _reason(body: dict[str, Any] | None) -> str:
    return str(_error(body).get("message") or "no reason was given")
