"""Text of a sequence as its tokens arrive: whole characters only, and nothing of a stop string.

Where the vocabulary spells bytes, every token's bytes go through one incremental UTF-8 decoder: a
microsecond a token, and exact. Other vocabularies decode a short window of tokens again and again.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
# Bytes of a character that may still be open at a prompt's end.
_MAX_OPEN_BYTES = 3
# Prompt tokens that a windowed decoder looks back at.
_WINDOW = 6


class DecodesTokens(Protocol):
    """What detokenisation needs of a tokenizer.

    With `byte_scheme` and `token_bytes`, as Tokenizer has them, the exact path is taken.
    """

    @property
    def all_special_ids(self) -> frozenset[int]: ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class IncrementalDetokenizer:
    """Turns the output tokens of one sequence into text, piece by piece.

    All pieces together, flush included, are the text that the output adds to the prompt's. A piece
    never ends inside a character: open bytes wait for the next token, and become U+FFFD at flush.
    """

    def __init__(
        self,
        tokenizer: DecodesTokens,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
    ) -> None:
        skipped = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        scheme: str | None = getattr(tokenizer, "byte_scheme", None)
        self._path: _BytePath | _WindowPath
        if scheme is None:
            self._path = _WindowPath(tokenizer, prompt_token_ids, skipped)
        else:
            token_bytes: Callable[[int], bytes] = tokenizer.token_bytes  # type: ignore[attr-defined]
            strip = scheme == "sentencepiece" and all(token in skipped for token in prompt_token_ids)
            self._path = _BytePath(token_bytes, prompt_token_ids, skipped, strip)

    def push(self, token_id: int) -> str:
        """Text that became final with this token; may be empty."""
        return self._path.push(token_id)

    def flush(self) -> str:
        """Text still open, at the end of the sequence."""
        return self._path.flush()


class _BytePath:
    __slots__ = ("_decode", "_skipped", "_strip", "_token_bytes")

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        prompt: Sequence[int],
        skipped: frozenset[int],
        strip: bool,
    ) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._strip = strip
        """The next visible piece is the first of the text and loses one leading space."""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._decode(_open_tail(token_bytes, prompt, skipped))

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        text = self._decode(self._token_bytes(token_id))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decode(b"", True)


def _open_tail(token_bytes: Callable[[int], bytes], prompt: Sequence[int], skipped: frozenset[int]) -> bytes:
    """Bytes at the prompt's end that begin a character without finishing it."""
    tail = b""
    for token in reversed(prompt):
        if len(tail) >= _MAX_OPEN_BYTES:
            break
        if token not in skipped:
            tail = token_bytes(token) + tail
    for length in range(min(_MAX_OPEN_BYTES, len(tail)), 0, -1):
        # A first byte of two to four; what follows it is judged by the decoder.
        if tail[-length] >= 0xC0:
            return tail[-length:]
    return b""


class _WindowPath:
    """Decodes from the last piece on, and holds the end back while it may be part of a character."""

    __slots__ = ("_decode", "_ids", "_read", "_skipped")

    def __init__(self, tokenizer: DecodesTokens, prompt: Sequence[int], skipped: frozenset[int]) -> None:
        self._decode = tokenizer.decode
        self._skipped = skipped
        visible = [token for token in prompt[-4 * _WINDOW :] if token not in skipped]
        self._ids = visible[-_WINDOW:]
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        return self._new_text(final=False)

    def flush(self) -> str:
        return self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._ids[: self._read], skip_special_tokens=False)
        now = self._decode(self._ids, skip_special_tokens=False)
        if len(now) <= len(before) or (now.endswith(_REPLACEMENT) and not final):
            return ""
        # What was read becomes the context of what comes; older tokens are no longer needed.
        del self._ids[: self._read]
        self._read = len(self._ids)
        return now[len(before) :]


class StopChecker:
    """Finds the first of several stop strings in text that arrives in pieces.

    Text that may be the beginning of a stop string is held back, so no part of one is ever emitted.
    The first is the one that is complete first; of several that end together, the longest.
    include_stop: emit the stop string too.
    """

    __slots__ = ("_held", "_include", "_stop", "hit")

    def __init__(self, stop: Sequence[str], include_stop: bool = False) -> None:
        self._stop = tuple(stop)
        self._include = include_stop
        self._held = ""
        self.hit: str | None = None
        """The stop string that ended the text; what is pushed after it is dropped."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that ended it, if one did."""
        if self.hit is not None:
            return "", self.hit
        if not self._stop or not text:
            return text, None
        text = self._held + text
        found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            end, _, self.hit = min(found)
            self._held = ""
            return text[: end if self._include else end - len(self.hit)], self.hit
        held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """Text still held back, at the end of the sequence: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text that are a beginning of the stop string, but not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
