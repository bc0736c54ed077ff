"""Tokens per minute and tenant: a bucket that fills steadily and may be overdrawn once.

How long an output will be is not known when a call comes, so a call is let in while its tenant's bucket is
not empty, its prompt is charged then, and its output when it has ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from polybatch.server.errors import HttpError

PERIOD_S = 60.0


class TokenRates:
    """Buckets of the tenants that have a limit; each holds one minute's worth of tokens."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """Tenant -> tokens, negative while overdrawn, and when that was so."""

    def enter(self, tenant: str, num_tokens: int, per_minute: int | None) -> None:
        """Charge a prompt. Raises HttpError 429 with the time until the tenant may come again."""
        if per_minute is None:
            self._buckets.pop(tenant, None)
            return
        now = self._clock()
        level, then = self._buckets.get(tenant, (float(per_minute), now))
        level = min(per_minute, level + (now - then) * per_minute / PERIOD_S)
        if level <= 0:
            wait_s = max(1, math.ceil((1 - level) * PERIOD_S / per_minute))
            raise HttpError(
                429,
                f"this tenant has used its {per_minute:,} tokens per minute; try again in {wait_s} s",
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait_s)},
            )
        self._buckets[tenant] = (level - num_tokens, now)

    def charge(self, tenant: str, num_tokens: int) -> None:
        """Charge an output, if the tenant has a limit."""
        if tenant in self._buckets:
            level, then = self._buckets[tenant]
            self._buckets[tenant] = (level - num_tokens, then)
