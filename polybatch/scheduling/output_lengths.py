"""How long outputs will be: given, learned from rows that have ended, or guessed. Only estimates.

What nothing but its length can end has max_tokens. A guess that is too low costs some preemptions, one that
is too high leaves pages empty: until rows like it have ended, nothing is held to be longer than 256 tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from polybatch.request import Request, Sequence

MIN_ROWS = 8
"""Rows that must have ended before others are expected to be like them."""

UNKNOWN_TOKENS = 256
"""The longest guess without any knowledge; a chat's max_tokens may be the rest of the context."""

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
    """Output tokens by kind of row: of one tenant, with one adapter and about the same max_tokens."""

    def __init__(self) -> None:
        self._by_kind: dict[Kind, _Lengths] = {}

    def observe(self, seq: Sequence) -> None:
        """A sequence ended by itself."""
        self._by_kind.setdefault(_kind(seq.request), _Lengths()).add(seq.num_output)

    def expected(self, request: Request) -> float:
        """Mean output tokens, from 1 to max_tokens."""
        if request.expected_tokens is not None:
            return max(1, min(request.expected_tokens, request.max_tokens))
        if _is_forced(request):
            return request.max_tokens
        known = self._known(request)
        return min(request.max_tokens, UNKNOWN_TOKENS if known is None else known.mean)

    def remaining(self, seq: Sequence) -> int:
        """Tokens still to come, a standard deviation above the mean, at least 1.

        What has outlived that is expected to go on for half as long again.
        """
        request, num_output = seq.request, seq.num_output
        expected = self.expected(request)
        known = self._known(request)
        if known is not None and request.expected_tokens is None and not _is_forced(request):
            expected += math.sqrt(known.squares / known.count)
        left = expected - num_output if num_output < expected else num_output / 2
        return max(1, min(math.ceil(left), request.max_tokens - num_output))

    def _known(self, request: Request) -> _Lengths | None:
        known = self._by_kind.get(_kind(request))
        return known if known is not None and known.count >= MIN_ROWS else None


def _is_forced(request: Request) -> bool:
    """Whether only its length can end it."""
    return not request.stop_token_ids and not request.params.stop


def _kind(request: Request) -> Kind:
    digest = "" if request.adapter is None else request.adapter.digest
    return request.tenant, digest, request.max_tokens.bit_length()
