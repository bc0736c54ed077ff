"""Keys for people: a browser asks for a password, and the API key is it.

A page cannot be opened with a Bearer header, so below /dashboard the key may also come by HTTP's Basic
scheme, with any user name. Nowhere else: a browser sends such a password by itself, and no other site shall
be able to make it call a route that does something.
"""

from __future__ import annotations

import base64
import binascii

from polybatch.server.auth import Caller, Keys
from polybatch.server.errors import HttpError

DASHBOARD = "/dashboard"
CHALLENGE = 'Basic realm="polybatch: any user, API key as password", charset="UTF-8"'
_SCHEME = "basic "


def is_for_browsers(path: str) -> bool:
    return path == DASHBOARD or path.startswith(f"{DASHBOARD}/")


def browser_caller(keys: Keys, authorization: str | None) -> Caller:
    """The caller of a page. Raises HttpError 401 that makes a browser ask for the key."""
    if authorization is not None and authorization[: len(_SCHEME)].lower() == _SCHEME:
        authorization = f"Bearer {_password(authorization[len(_SCHEME) :])}"
    try:
        return keys.caller_of(authorization)
    except HttpError as error:
        if error.status == 401:
            error.headers["WWW-Authenticate"] = CHALLENGE
        raise


def _password(credentials: str) -> str:
    """The password of `base64(user:password)`; empty, which is nobody's, for what is no such thing."""
    try:
        pair = base64.b64decode(credentials.strip(), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return pair.partition(":")[2]
