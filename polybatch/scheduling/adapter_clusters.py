"""Admission by adapter: a step reads every adapter of its batch, so those who share one are better together.

Once the running batch holds so many distinct adapters, waiting requests that bring no new one go first,
however deep in the queue they are. Where none is left, the adapter enters that most of the waiting share, so
that one reading of it serves many rows. Whoever is first in the policy's order is passed over at most
MAX_PASSED times, so everybody's turn comes.
Sources: adapter clustering of S-LoRA (Sheng et al. 2023), with a bound, and with the whole queue in view; for
what enters next, "most requests first" of broadcast scheduling (Dykeman et al. 1986).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from polybatch.request import SequenceStatus
from polybatch.scheduling.track import Track
from polybatch.scheduling.waiting import Waiting

MAX_PASSED = 32


class AdapterClusters:
    """A policy's waiting queue, with an index by adapter. Its own order is the policy's."""

    __slots__ = ("_groups", "_num_adapters", "_queue")

    def __init__(self, queue: Waiting, num_adapters: int) -> None:
        self._queue = queue
        self._num_adapters = num_adapters
        self._groups: dict[tuple[bool, str | None], dict[Track, None]] = {}
        """Who waits, rows of batches apart from live requests, by the adapter's digest."""

    def __len__(self) -> int:
        return len(self._queue)

    def head(self, n: int) -> Iterable[Track]:
        """The first `n` tracks in the policy's order."""
        return self._queue.head(n)

    def push(self, track: Track) -> None:
        self._groups.setdefault(_group_of(track), {})[track] = None
        self._queue.push(track)

    def remove(self, track: Track) -> None:
        """Take a track out, wherever it is. Raises ValueError if it is not there."""
        self._queue.remove(track)
        group = self._groups[_group_of(track)]
        del group[track]
        if not group:
            del self._groups[_group_of(track)]

    def to_admit(self, n: int, running: Sequence[Track]) -> Iterator[Track]:
        """Up to `n` tracks in the order in which to admit them.

        Between two of them the first may have been admitted; what its adapter is then counts as well. Live
        requests and rows of batches are not mixed, nor what the policy puts into different classes.
        """
        digests: set[str | None] = {
            track.adapter.ref.digest for track in running if track.adapter is not None
        }
        seen: set[Track] = set()
        for first in list(self._queue.head(n)):
            while first not in seen:
                track = first
                if len(digests) >= self._num_adapters and first.num_passed < MAX_PASSED:
                    track = self._oldest(digests, first, seen) or self._most_shared(first, seen) or first
                seen.add(track)
                yield track
                if track.seq.status is SequenceStatus.RUNNING:
                    first.num_passed += track is not first
                    if track.seq.adapter is not None:
                        digests.add(track.seq.adapter.digest)
                if len(seen) >= n:
                    return

    def _oldest(self, digests: set[str | None], first: Track, seen: set[Track]) -> Track | None:
        """Who has waited longest, of `first`'s class, of those that need no new adapter."""
        found: Track | None = None
        for digest in (None, *digests):
            track = _next(self._groups.get((first.is_batch, digest), {}), first, seen)
            if track is not None and (found is None or track.key < found.key):
                found = track
        return found

    def _most_shared(self, first: Track, seen: set[Track]) -> Track | None:
        """The next one of the largest group; None where `first`'s own is as large. O(waiting adapters)."""
        found: Track | None = None
        most = len(self._groups[_group_of(first)])
        for (is_batch, _), group in self._groups.items():
            if len(group) > most and is_batch == first.is_batch:
                track = _next(group, first, seen)
                if track is not None:
                    found, most = track, len(group)
        return found


def _next(group: Iterable[Track], first: Track, seen: set[Track]) -> Track | None:
    """Of a group, who is to be asked next and has `first`'s class."""
    for track in group:
        if track not in seen and track.key[0] == first.key[0]:
            return track
    return None


def _group_of(track: Track) -> tuple[bool, str | None]:
    return track.is_batch, None if track.seq.adapter is None else track.seq.adapter.digest
