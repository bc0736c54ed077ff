"""The waiting queue against a sorted list."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import request_of

from polybatch.request import Sequence
from polybatch.scheduling.track import Track
from polybatch.scheduling.waiting import WaitingQueue


def track_of(priority: int, order: int) -> Track:
    return Track(Sequence(request_of("r", 1)), (priority, order), None, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_the_queue_is_always_sorted_and_loses_nobody(seed: int, num_classes: int) -> None:
    rng = random.Random(seed)
    queue = WaitingQueue()
    model: list[Track] = []
    taken: list[Track] = []
    for order in range(300):
        kind = rng.random()
        if kind < 0.4 or not model:
            track = track_of(rng.randrange(num_classes), order)
            queue.push(track)
            model.append(track)
        elif kind < 0.85:
            track = model[0] if rng.random() < 0.8 else rng.choice(model)
            queue.remove(track)
            model.remove(track)
            taken.append(track)
        elif taken:
            track = taken.pop(rng.randrange(len(taken)))
            queue.push(track)
            model.append(track)
        model.sort(key=lambda track: track.key)
        assert len(queue) == len(model)
        assert queue.head(5) == model[:5]
    assert queue.head(1000) == model


def test_removing_who_does_not_wait_is_an_error() -> None:
    queue = WaitingQueue()
    queue.push(track_of(0, 1))
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove(track_of(0, 2))
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove(track_of(0, 1))
    assert len(queue) == 1
