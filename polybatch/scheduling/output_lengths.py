"""How long outputs will be: given, learned from rows that have ended, or else max_tokens. Only estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from polybatch.request import Request, Sequence

MIN_ROWS = 8
"""Rows that must have ended before others are expected to be like them."""

Kind = tuple[str, str, int]


@dataclass(slots=True)
class _Lengths:
    """Running mean and sum of squared deviations. Source: Welford (1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, length: int) -> None:
        self.count += 1
        before = length - self.mean
        self.mean += before / self.count
        self.squares += before * (length - self.mean)


class OutputLengths:
    """Output tokens by kind of row: rows of one tenant with one adapter and one max_tokens are alike."""

    def __init__(self) -> None:
        self._by_kind: dict[Kind, _Lengths] = {}

    def observe(self, seq: Sequence) -> None:
        """A sequence ended by itself."""
        self._by_kind.setdefault(_kind(seq.request), _Lengths()).add(seq.num_output)

    def expected(self, request: Request) -> float:
        """Mean output tokens, from 1 to max_tokens."""
        if request.expected_tokens is not None:
            return max(1, min(request.expected_tokens, request.max_tokens))
        known = self._by_kind.get(_kind(request))
        return request.max_tokens if known is None or known.count < MIN_ROWS else known.mean

    def remaining(self, seq: Sequence) -> int:
        """Tokens still to come, a standard deviation above the mean, at least 1.

        What has outlived that is expected to go on for half as long again.
        """
        request, num_output = seq.request, seq.num_output
        expected = self.expected(request)
        known = self._by_kind.get(_kind(request))
        if request.expected_tokens is None and known is not None and known.count >= MIN_ROWS:
            expected += math.sqrt(known.squares / known.count)
        left = expected - num_output if num_output < expected else num_output / 2
        return max(1, min(math.ceil(left), request.max_tokens - num_output))


def _kind(request: Request) -> Kind:
    return request.tenant, "" if request.adapter is None else request.adapter.digest, request.max_tokens
