"""Who calls: API keys to callers. Keys are kept as hashes and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass

from fastapi import Request

from polybatch.server.errors import HttpError

SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """tenant: whose cached prefixes the caller shares; every key is a tenant of its own."""

    tenant: str = ""
    is_admin: bool = False


class Keys:
    """The keys that a server takes. With no API key at all everybody may call, but not administer."""

    def __init__(self, api_keys: Iterable[str] = (), admin_keys: Iterable[str] = ()) -> None:
        self._callers = {_digest(key): Caller(_digest(key).hex()[:16]) for key in api_keys}
        self._is_open = not self._callers
        self._callers |= {_digest(key): Caller("admin", is_admin=True) for key in admin_keys}
        self.has_admin = any(caller.is_admin for caller in self._callers.values())

    @property
    def is_open(self) -> bool:
        """Whether calls need no key."""
        return self._is_open

    def caller_of(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises HttpError 401 for a missing or wrong key."""
        if authorization is None or authorization[: len(SCHEME)].lower() != SCHEME:
            if self._is_open:
                return Caller()
            raise _unauthorized("an API key is needed: send it as 'Authorization: Bearer KEY'")
        digest = _digest(authorization[len(SCHEME) :].strip())
        found: Caller | None = None
        # Every key is looked at, whatever matches, so that the time says nothing.
        for known, caller in self._callers.items():
            if hmac.compare_digest(known, digest):
                found = caller
        if found is not None:
            return found
        if self._is_open:
            return Caller()
        raise _unauthorized("the API key is wrong")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorized(message: str) -> HttpError:
    return HttpError(
        401,
        message,
        kind="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def caller_of(request: Request) -> Caller:
    """The caller that the gate let in."""
    caller: Caller = request.state.caller
    return caller


def require_admin(request: Request) -> None:
    """Dependency of routes that change the server. Raises HttpError 403."""
    if caller_of(request).is_admin:
        return
    keys: Keys = request.app.state.server.keys
    way_out = "send the admin key" if keys.has_admin else "start the server with --admin-api-key"
    raise HttpError(403, f"this route is for administrators: {way_out}", kind="permission_error")
