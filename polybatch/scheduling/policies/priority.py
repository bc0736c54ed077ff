"""Lower `Request.priority` first, then first come, first served."""

from __future__ import annotations

from typing import ClassVar

from polybatch.request import Request
from polybatch.scheduling.policies.base import Policy
from polybatch.scheduling.track import Key


class Priority(Policy):
    """The order of the numbers that requests carry; rows of batches have the largest."""

    summary: ClassVar[str] = "lower numbers first"
    is_by_arrival: ClassVar[bool] = True

    def key(self, request: Request, order: int, now: float) -> Key:
        return (request.priority, order)
