"""Match regular expressions of an untrusted file against module names, in bounded time.

Python's own matcher backtracks: `(a+)+b` from an adapter's configuration would keep it busy for hours. Here
an expression is parsed by Python and then evaluated on sets of positions: which ends can it reach from these
starts? Whether there is a match at all does not depend on greed or order, so the answer is the same,
in time polynomial in lengths that are bounded. What has no such meaning is refused: references to groups,
possessive and atomic parts, lookbehind, and flags.
Source: simulation of nondeterministic automata (Thompson 1968).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_PATTERN = 4096
"""Characters of an expression."""
MAX_DEPTH = 32
"""Parts within parts."""
MAX_LOOKAHEADS = 2
"""Lookaheads within lookaheads; each is tried at every position that the one around it reaches."""

_SIMPLE = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN)


class PatternError(ValueError):
    """An expression that is malformed or not supported here; the message says what."""


def check(pattern: str) -> None:
    """Raise PatternError where `reaches_end` could not evaluate the expression."""
    _check(_parse(pattern), 0, 0)


def reaches_end(pattern: str, text: str) -> bool:
    """What `re.fullmatch` would say of a checked expression."""
    return len(text) in _ends(_parse(pattern), text, {0})


@lru_cache(maxsize=256)
def _parse(pattern: str) -> Any:
    if len(pattern) > MAX_PATTERN:
        raise PatternError(f"it has {len(pattern):,} characters, at most {MAX_PATTERN:,} are read")
    try:
        parsed = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise PatternError(f"it is no regular expression: {error}") from error
    if parsed.state.flags & ~re.UNICODE:
        raise PatternError("flags are not supported")
    return parsed


def _check(items: Iterable[tuple[Any, Any]], depth: int, lookaheads: int) -> None:
    if depth > MAX_DEPTH or lookaheads > MAX_LOOKAHEADS:
        raise PatternError(f"its parts are nested more than {MAX_DEPTH} deep, or lookaheads {MAX_LOOKAHEADS}")
    for code, value in items:
        if code is op.BRANCH:
            for branch in value[1]:
                _check(branch, depth + 1, lookaheads)
        elif code in (op.MAX_REPEAT, op.MIN_REPEAT):
            _check(value[2], depth + 1, lookaheads)
        elif code is op.SUBPATTERN and not value[1] and not value[2]:
            _check(value[3], depth + 1, lookaheads)
        elif code in (op.ASSERT, op.ASSERT_NOT) and value[0] > 0:
            _check(value[1], depth + 1, lookaheads + 1)
        elif code not in _SIMPLE and code is not op.AT:
            raise PatternError(f"{str(code).lower().replace('_', ' ')} is not supported")


def _ends(items: Iterable[tuple[Any, Any]], text: str, starts: set[int]) -> set[int]:
    """Positions where the items, one after the other, can end when they begin at one of `starts`."""
    for code, value in items:
        if not starts:
            break
        if code in _SIMPLE:
            starts = {i + 1 for i in starts if i < len(text) and _is_in(code, value, text[i])}
        elif code is op.BRANCH:
            starts = set().union(*(_ends(branch, text, starts) for branch in value[1]))
        elif code is op.SUBPATTERN:
            starts = _ends(value[3], text, starts)
        elif code is op.AT:
            starts = {i for i in starts if _is_at(value, text, i)}
        elif code in (op.ASSERT, op.ASSERT_NOT):
            wanted = code is op.ASSERT
            starts = {i for i in starts if bool(_ends(value[1], text, {i})) is wanted}
        else:
            starts = _repeat(value, text, starts)
    return starts


def _repeat(value: Any, text: str, starts: set[int]) -> set[int]:
    least, most, body = value
    current, seen = starts, []
    for _ in range(least):
        # Sets that recur go on recurring: what matters is then only where in the cycle the count ends.
        if not current or current in seen:
            break
        seen.append(current)
        current = _ends(body, text, current)
    if current and current in seen:
        first = seen.index(current)
        current = seen[first + (least - first) % (len(seen) - first)]
    found, fresh, count = set(current), current, least
    while fresh and (most is op.MAXREPEAT or count < most):
        fresh = _ends(body, text, fresh) - found
        found |= fresh
        count += 1
    return found


def _is_in(code: Any, value: Any, character: str) -> bool:
    if code is op.ANY:
        return character != "\n"
    if code is op.LITERAL:
        return bool(ord(character) == value)
    if code is op.NOT_LITERAL:
        return bool(ord(character) != value)
    negated = value[0][0] is op.NEGATE
    return any(_is_of(kind, what, character) for kind, what in value) is not negated


def _is_of(kind: Any, what: Any, character: str) -> bool:
    if kind is op.RANGE:
        return bool(what[0] <= ord(character) <= what[1])
    if kind is op.CATEGORY:
        return _CATEGORIES[what].match(character) is not None
    return kind is op.LITERAL and bool(ord(character) == what)


_CATEGORIES = {
    op.CATEGORY_DIGIT: re.compile(r"\d"),
    op.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    op.CATEGORY_SPACE: re.compile(r"\s"),
    op.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    op.CATEGORY_WORD: re.compile(r"\w"),
    op.CATEGORY_NOT_WORD: re.compile(r"\W"),
}
_ANCHORS = {
    op.AT_BEGINNING: re.compile(r"^"),
    op.AT_BEGINNING_STRING: re.compile(r"\A"),
    op.AT_BOUNDARY: re.compile(r"\b"),
    op.AT_NON_BOUNDARY: re.compile(r"\B"),
    op.AT_END: re.compile(r"$"),
    op.AT_END_STRING: re.compile(r"\Z"),
}


def _is_at(anchor: Any, text: str, position: int) -> bool:
    return _ANCHORS[anchor].match(text, position) is not None
