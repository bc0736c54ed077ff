"""Reads one call, `{"name": ..., "arguments": {...}}`, as its text arrives.

The name is reported once it is complete, the arguments character by character; nothing is evaluated.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection
from dataclasses import dataclass

_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the newest call's arguments."""

    text: str


Event = Content | CallStart | Arguments


class State(enum.Enum):
    """OPENING -> (KEY -> COLON -> VALUE -> NEXT)* -> DONE; BAD from anywhere."""

    OPENING = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    NEXT = enum.auto()
    DONE = enum.auto()
    BAD = enum.auto()


class CallScanner:
    """names: functions that may be called; others are no call.

    name: of a call that stands in front of its arguments, so that the object is the arguments alone.
    """

    def __init__(self, names: Collection[str], name: str | None = None) -> None:
        self._names = names
        self.raw = ""
        """Everything consumed, until the call has started."""
        self.is_started = False
        self._events: list[Event] = []
        self._state = State.OPENING
        self._key = ""
        self._value: list[str] = []
        self._first = ""
        self._depth = 0
        self._is_string = self._is_escaped = False
        self._early: str | None = None
        self._has_arguments = False
        self._is_bare = name is not None
        if name is not None:
            self._key, self._state = _ARGUMENT_KEYS[0], State.VALUE
            self._start(name)

    @property
    def is_done(self) -> bool:
        return self._state is State.DONE

    @property
    def is_bad(self) -> bool:
        return self._state is State.BAD

    def push(self, text: str) -> tuple[int, list[Event]]:
        """Characters that belong to the call, fewer than all once it is done or bad, and what they say."""
        used = 0
        while used < len(text) and self._state not in (State.DONE, State.BAD):
            # What ends a number or a word is read again.
            used += self._take(text[used])
        if not self.is_started:
            self.raw += text[:used]
        if self._is_streaming and self._value:
            self._events.append(Arguments("".join(self._value)))
            self._value.clear()
        events, self._events = self._events, []
        return used, events

    @property
    def _is_streaming(self) -> bool:
        """Whether what is read goes out at once: arguments written as an object."""
        return (
            self._state is State.VALUE and self._key in _ARGUMENT_KEYS and self.is_started and self._depth > 0
        )

    def _take(self, char: str) -> int:
        if self._state is State.VALUE:
            return self._take_value(char)
        if self._state is State.KEY and (self._value or char == '"'):
            self._take_key(char)
        elif not char.isspace():
            self._state = {
                (State.OPENING, "{"): State.KEY,
                (State.KEY, "}"): State.DONE,
                (State.COLON, ":"): State.VALUE,
                (State.NEXT, ","): State.KEY,
                (State.NEXT, "}"): State.DONE,
            }.get((self._state, char), State.BAD)
            if self._state is State.DONE:
                self._finish()
        return 1

    def _take_key(self, char: str) -> None:
        self._value.append(char)
        if self._ends_string(char) and len(self._value) > 1:
            self._key = _decoded("".join(self._value)) or ""
            self._value.clear()
            self._state = State.COLON

    def _take_value(self, char: str) -> int:
        if not self._value and not self._depth and not self._is_string:
            if char.isspace():
                return 1
            self._first = char
        if self._is_string or char == '"':
            is_first = not self._is_string and char == '"'
            self._is_string = True
            self._value.append(char)
            if not is_first and self._ends_string(char):
                self._is_string = False
                if not self._depth:
                    self._end_value()
            return 1
        if char in "{[":
            self._depth += 1
        elif char in "}]" and self._depth:
            self._depth -= 1
            self._value.append(char)
            if not self._depth:
                self._end_value()
            return 1
        elif not self._depth and char in ",}]":
            self._end_value()
            return 0
        elif not self._depth and char.isspace():
            self._end_value()
            return 1
        self._value.append(char)
        return 1

    def _ends_string(self, char: str) -> bool:
        if self._is_escaped:
            self._is_escaped = False
            return False
        self._is_escaped = char == "\\"
        return char == '"'

    def _end_value(self) -> None:
        text = "".join(self._value)
        self._value.clear()
        self._state = State.NEXT
        if self._key in _NAME_KEYS:
            name = _decoded(text)
            if name is None or name not in self._names:
                self._state = State.BAD
                return
            self._start(name)
        elif self._key in _ARGUMENT_KEYS:
            self._add_arguments(text)
        if self._is_bare:
            self._state = State.DONE

    def _start(self, name: str) -> None:
        if self.is_started:
            return
        self.is_started = True
        self._events.append(CallStart(name))
        if self._early is not None:
            self._events.append(Arguments(self._early))

    def _add_arguments(self, text: str) -> None:
        # Some models write the object as a string; its text is what is meant.
        text = (_decoded(text) or "") if self._first == '"' else text
        self._has_arguments = True
        if self.is_started:
            self._events.append(Arguments(text))
        else:
            self._early = text

    def _finish(self) -> None:
        if not self.is_started:
            self._state = State.BAD
        elif not self._has_arguments:
            self._events.append(Arguments("{}"))


def _decoded(text: str) -> str | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
