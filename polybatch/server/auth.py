"""Who calls: API keys to callers. Keys are kept as hashes and compared in constant time.

A key is looked up by a keyed hash of its hash under a secret of this process: where in the table it falls,
and how long the look-up takes, tells a caller nothing about other keys, and does not grow with their number.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request

from polybatch.errors import ConfigError
from polybatch.server.errors import HttpError
from polybatch.server.key_file import ADMIN_TENANT, KeyRecord, Role, digest_of, read_keys

SCHEME = "bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """tenant: whose limits, shares and cached prefixes are the caller's.

    Keys of a file name their tenant; every key of a flag is a tenant of its own.
    """

    tenant: str = ""
    role: Role = Role.TENANT

    @property
    def is_admin(self) -> bool:
        return self.role is Role.ADMIN


class Keys:
    """The keys that a server takes. With no API key and no file everybody may call, but not administer."""

    def __init__(
        self,
        api_keys: Iterable[str] = (),
        admin_keys: Iterable[str] = (),
        file: Path | None = None,
        metrics_keys: Iterable[str] = (),
    ) -> None:
        """Raises ConfigError if the file cannot be used."""
        self._secret = secrets.token_bytes(32)
        fixed = [KeyRecord(digest_of(key).hex()[:16], digest_of(key)) for key in api_keys]
        self._is_open = not fixed and file is None
        fixed += [KeyRecord(ADMIN_TENANT, digest_of(key), Role.ADMIN) for key in admin_keys]
        fixed += [KeyRecord(ADMIN_TENANT, digest_of(key), Role.METRICS) for key in metrics_keys]
        self._fixed, self._file = fixed, file
        self._callers: dict[bytes, tuple[bytes, Caller]] = {}
        self.reload()

    @property
    def is_open(self) -> bool:
        """Whether calls need no key."""
        return self._is_open

    @property
    def has_admin(self) -> bool:
        return any(caller.is_admin for _, caller in self._callers.values())

    @property
    def tenants(self) -> frozenset[str]:
        """Those who may generate."""
        return frozenset(
            caller.tenant for _, caller in self._callers.values() if caller.role is not Role.METRICS
        )

    def reload(self) -> None:
        """Read the file again; calls that were let in go on. Raises ConfigError, changing nothing."""
        records = self._fixed + (read_keys(self._file) if self._file is not None else [])
        callers = {
            self._blind(record.digest): (record.digest, Caller(record.tenant, record.role))
            for record in records
        }
        if len(callers) < len(records):
            raise ConfigError(
                f"a key of --api-keys {self._file} is also given by a flag: remove one of the two"
            )
        self._callers = callers

    def caller_of(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises HttpError 401 for a missing or wrong key."""
        if authorization is None or authorization[: len(SCHEME)].lower() != SCHEME:
            if self._is_open:
                return Caller()
            raise _unauthorized("an API key is needed: send it as 'Authorization: Bearer KEY'")
        digest = digest_of(authorization[len(SCHEME) :].strip())
        known, caller = self._callers.get(self._blind(digest), (b"", None))
        if caller is not None and hmac.compare_digest(known, digest):
            return caller
        if self._is_open:
            return Caller()
        raise _unauthorized("the API key is wrong")

    def _blind(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, hashlib.sha256)


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


def require_watcher(request: Request) -> None:
    """Dependency of routes that show what all tenants do together. Raises HttpError 403."""
    keys: Keys = request.app.state.server.keys
    if not keys.is_open and caller_of(request).role is Role.TENANT:
        raise HttpError(
            403,
            "metrics are for operators, since they name all adapters: send the admin key or one that was "
            "given as --metrics-api-key",
            kind="permission_error",
        )
