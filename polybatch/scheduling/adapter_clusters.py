"""Admission by adapter: a step reads every adapter of its batch, so those who share one are better together.

Once the running batch holds so many distinct adapters, waiting requests that bring no new one go first;
nobody is passed over more than MAX_PASSED times.
Source: adapter clustering of S-LoRA (Sheng et al. 2023), with a bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from polybatch.request import SequenceStatus
from polybatch.scheduling.track import Track

MAX_PASSED = 64


def clustered(waiting: Iterable[Track], running: Sequence[Track], num_adapters: int) -> Iterator[Track]:
    """The waiting tracks in the order in which to admit them.

    waiting: in the policy's order. Between two of them the first may have been admitted; what its adapter is
    then counts as well. Live requests and rows of batches are not mixed.
    """
    digests = {track.adapter.ref.digest for track in running if track.adapter is not None}
    rest = list(waiting)
    while rest:
        at = _pick(rest, digests) if len(digests) >= num_adapters else 0
        track = rest.pop(at)
        yield track
        if track.seq.status is SequenceStatus.RUNNING:
            for passed in rest[:at]:
                passed.num_passed += 1
            if track.seq.adapter is not None:
                digests.add(track.seq.adapter.digest)


def _pick(rest: list[Track], digests: set[str]) -> int:
    """The first that brings no new adapter; the first of all where there is none, or it waited too long."""
    is_batch = rest[0].is_batch
    for index, track in enumerate(rest):
        if track.is_batch != is_batch or track.num_passed >= MAX_PASSED:
            return index if track.is_batch == is_batch else 0
        if track.seq.adapter is None or track.seq.adapter.digest in digests:
            return index
    return 0
