"""The waiting queue, sorted by the policy's key, with cheap ends.

A sorted list whose consumed front is only skipped: a newcomer under FCFS goes to the end and a preempted
sequence to the front in O(1); anywhere else costs one move of memory, microseconds at 100,000 entries.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from polybatch.scheduling.track import Key, Track


class Waiting(Protocol):
    """What the scheduler needs of a waiting queue."""

    def __len__(self) -> int: ...

    def head(self, n: int) -> Iterable[Track]:
        """The first `n` tracks. A track may be removed and admitted while they are gone through."""
        ...

    def push(self, track: Track) -> None: ...

    def remove(self, track: Track) -> None: ...


class WaitingQueue:
    """Tracks in order of their keys."""

    __slots__ = ("_first", "_keys", "_tracks")

    def __init__(self) -> None:
        self._keys: list[Key | None] = []
        self._tracks: list[Track | None] = []
        self._first = 0

    def __len__(self) -> int:
        return len(self._keys) - self._first

    def head(self, n: int) -> list[Track]:
        """The first `n` tracks."""
        tracks = islice(self._tracks, self._first, self._first + n)
        return [track for track in tracks if track is not None]

    def tail(self, n: int) -> list[Track]:
        """The last `n` tracks, last one first."""
        tracks = self._tracks[max(self._first, len(self._tracks) - n) :]
        return [track for track in reversed(tracks) if track is not None]

    def push(self, track: Track) -> None:
        first = self._first
        if first and (first == len(self._keys) or track.key < self._key(first)):
            self._first = first - 1
            self._keys[first - 1] = track.key
            self._tracks[first - 1] = track
            return
        at = bisect_left(self._keys, track.key, lo=first)  # type: ignore[type-var]
        self._keys.insert(at, track.key)
        self._tracks.insert(at, track)

    def remove(self, track: Track) -> None:
        """Take a track out, wherever it is. Raises ValueError if it is not there."""
        at = bisect_left(self._keys, track.key, lo=self._first)  # type: ignore[type-var]
        if at == len(self._keys) or self._tracks[at] is not track:
            raise ValueError(f"{track.seq!r} does not wait")
        if at > self._first:
            del self._keys[at], self._tracks[at]
            return
        self._keys[at] = self._tracks[at] = None
        self._first += 1
        if self._first > 64 and self._first * 2 > len(self._keys):
            del self._keys[: self._first], self._tracks[: self._first]
            self._first = 0

    def _key(self, at: int) -> Key:
        key = self._keys[at]
        assert key is not None
        return key
