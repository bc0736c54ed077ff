"""Pages of a list: what a client may ask for, and OpenAI's list object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polybatch.errors import RequestError


def check_query(query: Mapping[str, str], parameters: Sequence[Mapping[str, Any]]) -> None:
    """Raise RequestError for a name that is none of the described parameters."""
    known = [parameter["name"] for parameter in parameters]
    for name in query:
        if name not in known:
            raise RequestError(
                f"query parameter {name[:80]!r} is unknown; known are {', '.join(known)}", field=name[:80]
            )


def page_limit(query: Mapping[str, str], default: int, most: int) -> int:
    """`limit` of a query. Raises RequestError."""
    text = query.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise RequestError(f"limit is {text[:80]!r}; it must be from 1 to {most:,}", field="limit")
    return int(text)


def listed(bodies: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """The list object of up to `limit` bodies; one more than that says that there are more."""
    shown = bodies[:limit]
    return {
        "object": "list",
        "data": list(shown),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(bodies) > limit,
    }
