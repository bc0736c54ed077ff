"""Memory of request bodies: bounded over all requests, from their first byte until they are answered."""

from __future__ import annotations

from polybatch.server.errors import HttpError


class BodyBudget:
    """Bytes that the bodies of all requests under way may take together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0


class BodyLease:
    """What one request has of the budget."""

    __slots__ = ("_budget", "_num_bytes")

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._num_bytes = budget, 0

    def take(self, num_bytes: int) -> None:
        """Count bytes that have come. Raises HttpError 429 if there are too many."""
        budget = self._budget
        if budget.num_bytes + num_bytes > budget.max_bytes:
            raise HttpError(
                429,
                f"the server is busy: request bodies of {budget.num_bytes:,} bytes are under way, the limit "
                f"is {budget.max_bytes:,}; try again later",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1", "Connection": "close"},
            )
        budget.num_bytes += num_bytes
        self._num_bytes += num_bytes

    def release(self) -> None:
        """The request was answered. Idempotent."""
        self._budget.num_bytes -= self._num_bytes
        self._num_bytes = 0
