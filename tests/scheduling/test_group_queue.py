"""Rows of batches by group: order, who joins whom, what KV is still waited for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_helpers import adapter_of, request_of

from polybatch.request import AdapterRef, Request, Sequence
from polybatch.scheduling.group_queue import GroupQueue
from polybatch.scheduling.policies import BATCH_PRIORITY
from polybatch.scheduling.track import Track

PAGE = 4


def row(
    name: str,
    prompt: list[int],
    max_tokens: int = 4,
    adapter: AdapterRef | None = None,
    *,
    live: bool = False,
) -> Track:
    row.count = getattr(row, "count", 0) + 1  # type: ignore[attr-defined]
    request = request_of(name, prompt, max_tokens, adapter=adapter, priority=0 if live else BATCH_PRIORITY)
    key = (0 if live else 2, row.count)  # type: ignore[attr-defined]
    return Track(Sequence(request), key, f"model/{adapter.digest if adapter else ''}", max_pages=1)


def queue_of(*tracks: Track) -> GroupQueue:
    def expected(request: Request) -> float:
        return request.max_tokens

    queue = GroupQueue(PAGE, expected)
    for track in tracks:
        queue.push(track)
    return queue


def names(queue: GroupQueue, n: int = 1000) -> list[str]:
    return [track.seq.request.request_id for track in queue.head(n)]


def group(name: str, size: int, first: int, max_tokens: int = 4) -> list[Track]:
    return [row(f"{name}{i}", [first] * 8 + [i], max_tokens) for i in range(size)]


def test_groups_are_handed_out_whole_decode_heavy_first() -> None:
    tracks = group("a", 3, 1, max_tokens=2) + group("b", 3, 2, max_tokens=50) + group("c", 3, 3, max_tokens=9)
    random.Random(1).shuffle(tracks)
    assert names(queue_of(*tracks)) == ["b0", "b1", "b2", "c0", "c1", "c2", "a0", "a1", "a2"]


def test_live_requests_come_first_as_they_came() -> None:
    tracks = [*group("a", 3, 1), row("y", [1] * 9, live=True), row("x", [5], live=True)]
    assert names(queue_of(*tracks), 4) == ["y", "x", "a0", "a1"]


def test_a_group_that_has_begun_is_finished_before_others_whatever_comes() -> None:
    tracks = group("a", 3, 1, max_tokens=9)
    queue = queue_of(*tracks)
    first = next(iter(queue.head(1)))
    queue.remove(first)
    for track in group("z", 100, 2, max_tokens=1000):
        queue.push(track)
    rest = {track.seq.request.request_id for track in tracks} - {first.seq.request.request_id}
    assert set(names(queue, 2)) == rest


def test_a_newcomer_joins_the_group_of_its_nearest_neighbour() -> None:
    queue = queue_of(*group("a", 3, 1), *group("b", 3, 2), *(row(f"s{i}", [9, i]) for i in range(60)))
    names(queue)
    newcomer = row("a9", [1] * 8 + [9])
    queue.push(newcomer)
    order = names(queue)
    assert order.index("a9") == order.index("a2") + 1
    assert queue.bundle_of(newcomer) is not None


def test_two_rows_alone_become_a_group_when_they_meet() -> None:
    alone = row("a0", [1] * 9)
    queue = queue_of(alone, *(row(f"s{i}", [9, i]) for i in range(60)))
    names(queue)
    queue.push(row("a1", [1] * 8 + [2]))
    order = names(queue)
    assert abs(order.index("a0") - order.index("a1")) == 1
    bundle = queue.bundle_of(alone)
    assert bundle is not None
    assert bundle.prefix_tokens == 8


def test_a_preempted_row_comes_before_all_groups() -> None:
    tracks = group("a", 3, 1)
    queue = queue_of(*tracks, *group("b", 3, 2))
    track = tracks[1]
    names(queue)
    queue.remove(track)
    track.seq.num_preemptions, track.key = 1, (1, 0)
    queue.push(track)
    assert names(queue, 1) == ["a1"]


def test_rows_of_one_adapter_stay_together_and_share_with_no_other() -> None:
    adapters = [adapter_of("x"), adapter_of("y"), None]
    tracks = [
        row(f"{a.name if a else '-'}{p}{i}", [p] * 8 + [i], 1 + 7 * i, a)
        for i in range(3) for p in range(3) for a in adapters
    ]  # fmt: skip
    order = [name[0] for name in names(queue_of(*tracks)) if name[0] != "-"]
    assert order in (["x"] * 9 + ["y"] * 9, ["y"] * 9 + ["x"] * 9)


def test_taking_out_what_does_not_wait_is_refused() -> None:
    track = row("a", [1, 2])
    queue = queue_of(track)
    queue.remove(track)
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove(track)
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove(row("b", [1], live=True))


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=10)


@settings(max_examples=120, deadline=None)
@given(st.lists(prompts, max_size=15), prompts)
def test_wanted_is_the_longest_common_prefix_with_any_row_that_waits(
    waiting: list[list[int]], leaving: list[int]
) -> None:
    def common(a: list[int], b: list[int]) -> int:
        length = 0
        while length < min(len(a), len(b)) and a[length] == b[length]:
            length += 1
        return length

    queue = queue_of(*(row(f"r{i}", prompt) for i, prompt in enumerate(waiting)))
    wanted = queue.num_wanted(row("leaving", leaving))
    assert wanted == max((common(leaving, prompt) for prompt in waiting), default=0)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_under_any_traffic_what_waits_is_handed_out_once_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    queue, waiting = queue_of(), {}
    adapters = [None, adapter_of("x"), adapter_of("y")]
    for number in range(150):
        chance = rng.random()
        if chance < 0.6 or not waiting:
            prompt = [rng.randrange(2)] * rng.choice([0, 4, 8, 9]) + [rng.randrange(3) for _ in range(4)]
            track = row(
                f"r{number}", prompt, rng.randint(1, 9), rng.choice(adapters), live=rng.random() < 0.2
            )
            track.seq.num_preemptions = int(rng.random() < 0.1)
            queue.push(track)
            waiting[track.seq.request.request_id] = track
        elif chance < 0.8:
            track = waiting.pop(rng.choice(list(waiting)))
            queue.remove(track)
        else:
            # What is admitted is taken out while the rest is gone through.
            for track in queue.head(rng.randint(1, 9)):
                if rng.random() < 0.7:
                    queue.remove(track)
                    del waiting[track.seq.request.request_id]
        assert len(queue) == len(waiting)
        if number % 10 == 0:
            found = names(queue)
            assert sorted(found) == sorted(waiting)
            live = [not waiting[name].is_batch for name in found]
            assert live == sorted(live, reverse=True)
    for track in waiting.values():
        queue.remove(track)
    assert len(queue) == 0
    assert names(queue) == []
