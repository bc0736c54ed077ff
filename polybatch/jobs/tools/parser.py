"""Tells calls from text as an output arrives. What looks like a call and is none stays text."""

from __future__ import annotations

import enum
import re
from collections.abc import Collection

from polybatch.jobs.tools.scanner import CallScanner, Content, Event
from polybatch.jobs.tools.styles import ToolStyle

_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*(\[CALL_ID\][A-Za-z0-9]*)?(\[ARGS\]|(?=\{))")
_NAMED_SO_FAR = re.compile(r"\s*[A-Za-z0-9_.-]{0,64}\s*(\[[A-Za-z0-9_\]]*){0,2}")


class Mode(enum.Enum):
    """TEXT until a mark, BETWEEN before, after and between calls, CALL within one."""

    TEXT = enum.auto()
    BETWEEN = enum.auto()
    CALL = enum.auto()


class ToolParser:
    """One completion's text, in pieces, to content and calls. names: functions that may be called."""

    def __init__(self, style: ToolStyle, names: Collection[str]) -> None:
        self._style, self._names = style, names
        self._mode = Mode.BETWEEN if style.is_bare else Mode.TEXT
        self._buffer = ""
        # What was consumed since the last text or call, and is text should no call come of it.
        self._pending = ""
        self._scanner = CallScanner(names)
        self._is_after_call = False

    def push(self, text: str) -> list[Event]:
        """What became certain with this text."""
        self._buffer += text
        events: list[Event] = []
        while self._advance(events):
            pass
        return events

    def close(self) -> list[Event]:
        """The rest, at the end of the output: an unfinished call that has no name yet is text."""
        rest = self._unread() + self._buffer
        if self._mode is Mode.CALL:
            rest = "" if self._scanner.is_started else self._unread() + self._scanner.raw
        events: list[Event] = []
        self._add_content(rest, events)
        self._pending = self._buffer = ""
        return events

    def _advance(self, events: list[Event]) -> bool:
        """Take one step through the buffer; False where more text is needed."""
        match self._mode:
            case Mode.TEXT:
                return self._read_text(events)
            case Mode.BETWEEN:
                return self._read_between(events)
        return self._read_call(events)

    def _read_text(self, events: list[Event]) -> bool:
        start = self._style.start
        at = self._buffer.find(start)
        if at >= 0:
            self._add_content(self._buffer[:at].rstrip("\n"), events)
            self._pending, self._buffer = start, self._buffer[at + len(start) :]
            self._mode = Mode.BETWEEN
            return True
        # The end may begin a mark, and line breaks before one are not shown.
        held = _overlap(self._buffer, start)
        shown = self._buffer[: len(self._buffer) - held].rstrip("\n")
        self._add_content(shown, events)
        self._buffer = self._buffer[len(shown) :]
        return False

    def _read_between(self, events: list[Event]) -> bool:
        style, buffer = self._style, self._buffer
        if not buffer:
            return False
        for mark in filter(None, (style.end, style.start)):
            if buffer.startswith(mark):
                self._consume(len(mark))
                if mark == style.end:
                    self._pending, self._mode = "", Mode.TEXT
                return True
            if mark.startswith(buffer):
                return False
        if buffer[0] == "{":
            self._scanner, self._mode = CallScanner(self._names), Mode.CALL
            return True
        if style.has_named_calls and (found := self._read_name()) is not None:
            return found
        if buffer[0] in style.separators:
            self._consume(1)
            return True
        self._add_content(self._unread(), events)
        self._mode, self._pending = Mode.TEXT, ""
        return True

    def _read_name(self) -> bool | None:
        """A name in front of its arguments; False while it is incomplete, None where there is none."""
        found = _NAMED.match(self._buffer)
        if found is not None and found.group(1) in self._names:
            self._buffer = self._buffer[found.end() :]
            self._scanner, self._mode = CallScanner(self._names, found.group(1)), Mode.CALL
            return True
        is_incomplete = found is None and _NAMED_SO_FAR.fullmatch(self._buffer) is not None
        is_name = self._buffer.lstrip()[:1] not in ("", "[")
        return False if is_incomplete and is_name else None

    def _read_call(self, events: list[Event]) -> bool:
        used, found = self._scanner.push(self._buffer)
        events += found
        self._buffer = self._buffer[used:]
        if self._scanner.is_done:
            self._mode, self._pending = Mode.BETWEEN, ""
            self._is_after_call = True
            return True
        if self._scanner.is_bad:
            self._mode = Mode.TEXT
            if not self._scanner.is_started:
                self._add_content(self._unread() + self._scanner.raw, events)
            self._pending = ""
            return True
        return False

    def _consume(self, count: int) -> None:
        self._pending += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _add_content(self, text: str, events: list[Event]) -> None:
        if self._is_after_call:
            # White space after a call is no answer.
            text = text.lstrip()
            self._is_after_call = not text
        if text:
            events.append(Content(text))

    def _unread(self) -> str:
        """What was consumed for a call that did not come; separators after one that did are none of it."""
        is_text = not self._is_after_call or self._style.start in self._pending
        return self._pending if is_text else ""


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of the text that begin the mark."""
    longest = min(len(mark) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(mark[:size])), 0)
