"""The file of API keys: a line per key with its tenant and its hash, never the key itself.

    # comments and empty lines are fine
    acme   sha256:9f86d0...
    acme   sha256:60303a...
    ops    sha256:fd61a0... admin
    ops    sha256:1b4f0e... metrics

Keys are 256 random bits, which nobody guesses from a hash however fast it is computed; a deliberately slow
hash helps keys that people choose, and these are none. Several lines of one tenant are keys of equal right,
so that a key is replaced by adding one, moving clients over, and removing the other.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from polybatch.errors import ConfigError

PREFIX = "pb-"
KEY_BYTES = 32
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ADMIN_TENANT = "admin"
_HASH = re.compile(r"sha256:([0-9a-f]{64})")


class Role(enum.StrEnum):
    """What a key is for: TENANT to generate, ADMIN for everything, METRICS to watch."""

    TENANT = "tenant"
    ADMIN = "admin"
    METRICS = "metrics"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key that the server takes. digest: SHA-256 of the key."""

    tenant: str
    digest: bytes
    role: Role = Role.TENANT


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def check_tenant(tenant: str) -> str:
    """A tenant's name. Raises ConfigError if it is none."""
    if not TENANT.fullmatch(tenant):
        raise ConfigError(
            f"tenant is {tenant[:80]!r}; it must be 1 to 64 letters, digits or ._- and begin with one of the "
            "first two"
        )
    return tenant


def read_keys(path: Path) -> list[KeyRecord]:
    """All keys of a file. Raises ConfigError that names the line; a file without keys is an error, too."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys {path} cannot be read: {error}") from error
    records: dict[bytes, KeyRecord] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"--api-keys {path}, line {number}"
        found = _HASH.fullmatch(words[1]) if len(words) in (2, 3) else None
        if found is None or words[2:] not in ([], [Role.ADMIN], [Role.METRICS]):
            # The line itself is not shown: somebody may have put a key there.
            raise ConfigError(
                f"{where} must read: TENANT sha256:HASH [admin|metrics]; see polybatch keys new --help"
            )
        try:
            tenant = check_tenant(words[0])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        role = Role(words[2]) if words[2:] else Role.TENANT
        if tenant == ADMIN_TENANT and role is not Role.ADMIN:
            raise ConfigError(
                f"{where}: the tenant {ADMIN_TENANT} is for administrators: choose another name"
            )
        digest = bytes.fromhex(found[1])
        if digest in records:
            raise ConfigError(f"{where} has a key that stands in the file already: remove one of the two")
        records[digest] = KeyRecord(tenant, digest, role)
    if not records:
        raise ConfigError(f"--api-keys {path} has no keys: add one with polybatch keys new --tenant NAME")
    return list(records.values())


def add_key(path: Path, tenant: str, role: Role = Role.TENANT) -> str:
    """Make a key, append its hash to a file that only its owner may read, and return it.

    Raises ConfigError for a bad tenant or a file that cannot be written.
    """
    check_tenant(tenant)
    if tenant == ADMIN_TENANT and role is not Role.ADMIN:
        raise ConfigError(
            f"the tenant {ADMIN_TENANT} is for administrators: choose another name, or add --admin"
        )
    key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
    suffix = "" if role is Role.TENANT else f" {role}"
    line = f"{tenant} sha256:{digest_of(key).hex()}{suffix}\n"
    try:
        # One write of one line, so that two commands at once do not mix theirs.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be written: {error}") from error
    return key
