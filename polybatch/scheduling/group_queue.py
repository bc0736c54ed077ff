"""The waiting queue of the policy `prefix_groups`: rows of batches, group by group.

    push -> index of prompts, sorted -> plan of groups, made when asked for -> head

Live requests come first, as they came. Of rows of batches come first those that ran before and siblings of
those that run; then the rest of the groups that have begun; then groups by plan. A newcomer joins the group
of its nearest neighbour; when many have come, all groups that have not begun are planned anew, so that
planning costs O(log n) a row.

The index also answers how much of a sequence's KV anybody still waits for: the longest common prefix with
what waits is that with a neighbour in sorted order. What nobody waits for is dead and need not be kept.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from polybatch.request import Request
from polybatch.scheduling.prefix_groups import PlanRow, common_tokens, plan_groups, prompt_key
from polybatch.scheduling.track import Track
from polybatch.scheduling.waiting import WaitingQueue

MIN_REPLANNED = 32
"""Newcomers that are put beside their neighbours before everything is planned anew."""

Place = tuple[bytes, int, Track]
"""A waiting track by its prompt's key and a number that makes it unique."""


@dataclass(slots=True, eq=False)
class Bundle:
    """A group as far as it waits.

    prefix_tokens: common to all, 0 for a single row. members: in the tree's order. has_begun: one was taken
    out, so the rest goes before other groups.
    """

    prefix_tokens: int
    members: list[Place] = field(default_factory=list)
    has_begun: bool = False


@dataclass(slots=True, eq=False)
class _Entry:
    place: Place
    bundle: Bundle | None = None
    """None for what waits ahead of all groups, or is yet to be planned."""
    is_ahead: bool = False


class GroupQueue:
    """Waiting tracks by group.

    page_size: prefixes count in whole pages. expected_tokens: output that a request is expected to have.
    """

    def __init__(self, page_size: int, expected_tokens: Callable[[Request], float]) -> None:
        self._page_size = page_size
        self._expected_tokens = expected_tokens
        self._live = WaitingQueue()
        self._ahead = WaitingQueue()
        self._entries: dict[Track, _Entry] = {}
        self._index: dict[str, list[Place]] = {}
        """By namespace, all rows of batches that wait."""
        self._begun: list[Bundle] = []
        self._planned: deque[Bundle] = deque()
        self._unplanned: dict[Track, _Entry] = {}
        self._num_placed = 0
        self._num_pushed = 0
        self._salts: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._live) + len(self._entries)

    def head(self, n: int) -> Iterator[Track]:
        """Up to `n` tracks, in the order in which they should be admitted."""
        first = [*self._live.head(n), *self._ahead.head(n)][:n]
        yield from first
        num_left = n - len(first)
        planned = self._planned
        while planned and (planned[0].has_begun or not planned[0].members):
            planned.popleft()
        self._plan()
        begun = self._begun = [bundle for bundle in self._begun if bundle.members]
        for bundles in (begun, planned):
            for bundle in bundles:
                if num_left <= 0:
                    return
                if bundle.has_begun and bundles is planned:
                    continue
                # Copied: members are taken out while they are gone through.
                for _, _, track in bundle.members[:num_left]:
                    yield track
                    num_left -= 1

    def push(self, track: Track) -> None:
        if not track.is_batch:
            self._live.push(track)
            return
        self._num_pushed += 1
        place = (self._key(track), self._num_pushed, track)
        entry = self._entries[track] = _Entry(place)
        if track.namespace is not None:
            insort(self._index.setdefault(track.namespace, []), place)
        if track.seq.num_preemptions or track.seq.index:
            entry.is_ahead = True
            self._ahead.push(track)
        else:
            self._unplanned[track] = entry

    def remove(self, track: Track) -> None:
        """Take a track out, wherever it is. Raises ValueError if it is not there."""
        if not track.is_batch:
            self._live.remove(track)
            return
        entry = self._entries.pop(track, None)
        if entry is None:
            raise ValueError(f"{track.seq!r} does not wait")
        if track.namespace is not None:
            places = self._index[track.namespace]
            del places[bisect_left(places, entry.place)]
            if not places:
                del self._index[track.namespace]
        if entry.is_ahead:
            self._ahead.remove(track)
        elif entry.bundle is None:
            del self._unplanned[track]
        else:
            bundle = entry.bundle
            del bundle.members[bisect_left(bundle.members, entry.place)]
            if not bundle.has_begun:
                bundle.has_begun = True
                self._begun.append(bundle)

    def bundle_of(self, track: Track) -> Bundle | None:
        """The group of a waiting track; None for what waits ahead of all groups."""
        entry = self._entries.get(track)
        return None if entry is None else entry.bundle

    def begun(self) -> Iterator[tuple[Bundle, Track]]:
        """Members of groups that have begun who still wait."""
        for bundle in self._begun:
            for _, _, track in bundle.members:
                yield bundle, track

    def num_wanted(self, track: Track) -> int:
        """How many tokens, from the first on, of a track's KV some row of a batch waits for."""
        if track.namespace is None:
            return 0
        places = self._index.get(track.namespace)
        if not places:
            return 0
        key = self._key(track)
        at = bisect_left(places, key, key=lambda place: place[0])
        neighbours = places[max(0, at - 1) : at + 1]
        return max(common_tokens(key, other) for other, _, _ in neighbours)

    def _key(self, track: Track) -> bytes:
        tokens, at = track.cache_keys, track.num_shared
        if at and at < len(tokens):
            # The salted token has more than 32 bits; a number of its own stands for it, below all tokens.
            own = self._salts.setdefault(tokens[at], -2 - len(self._salts))
            tokens = [*tokens[:at], own, *tokens[at + 1 :]]
        return prompt_key(tokens)

    def _plan(self) -> None:
        """Give every newcomer a group."""
        unplanned = list(self._unplanned.values())
        if not unplanned:
            return
        self._num_placed += len(unplanned)
        is_anew = not self._planned or self._num_placed > max(MIN_REPLANNED, len(self._entries) // 2)
        alone = []
        for entry in unplanned:
            if self._join(entry, only_begun=is_anew):
                continue
            alone.append(entry)
            if not is_anew:
                entry.bundle = Bundle(0, [entry.place])
                self._planned.append(entry.bundle)
        if is_anew:
            self._num_placed = 0
            waiting = [
                place[2] for bundle in self._planned if not bundle.has_begun for place in bundle.members
            ]
            self._plan_anew([self._entries[track] for track in waiting] + alone)
        self._unplanned.clear()

    def _plan_anew(self, entries: list[_Entry]) -> None:
        rows = []
        for number, entry in enumerate(entries):
            key, _, track = entry.place
            request = track.seq.request
            # What shares nothing is in a namespace by itself.
            namespace = f"{number}" if track.namespace is None else f"/{track.namespace}"
            digest = "" if request.adapter is None else request.adapter.digest
            rows.append(PlanRow(key, self._expected_tokens(request), namespace, digest))
        self._planned.clear()
        for group in plan_groups(rows, self._page_size).groups:
            bundle = Bundle(group.prefix_tokens, [entries[row].place for row in group.rows])
            bundle.members.sort()
            for row in group.rows:
                entries[row].bundle = bundle
            self._planned.append(bundle)

    def _join(self, entry: _Entry, *, only_begun: bool) -> bool:
        """Let a newcomer join its nearest neighbour's group; False where it has none."""
        key, _, track = entry.place
        if track.namespace is None:
            return False
        places = self._index[track.namespace]
        at = bisect_left(places, entry.place)
        best, most = None, self._page_size - 1
        for other, _, neighbour in (*places[max(0, at - 1) : at], *places[at + 1 : at + 2]):
            bundle = self._entries[neighbour].bundle
            if bundle is None or (only_begun and not bundle.has_begun):
                continue
            common = common_tokens(key, other)
            if common > most and common >= bundle.prefix_tokens:
                best, most = bundle, common
        if best is None:
            return False
        if not best.prefix_tokens:
            best.prefix_tokens = most // self._page_size * self._page_size
        insort(best.members, entry.place)
        entry.bundle = best
        return True
