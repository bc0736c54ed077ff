"""Every live sequence: where it is, and how it moves between waiting, running and its end.

Pages are held exactly while a sequence runs. Siblings of n > 1 are parked until the first of them has
computed the prompt, whose KV they then share. No steps here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from polybatch.config import SchedulerConfig
from polybatch.memory.arena import Arena
from polybatch.request import FinishReason, Sequence, SequenceStatus
from polybatch.scheduling.adapter_clusters import AdapterClusters
from polybatch.scheduling.admission import Admission
from polybatch.scheduling.inflight import PrefixesInFlight
from polybatch.scheduling.policies import Policy
from polybatch.scheduling.track import Track

_KEY, _IS_BATCH = attrgetter("key"), attrgetter("is_batch")


class LiveTracks:
    """Queues of a scheduler.

    running: sorted by key, in two parts: decoding, prefilling. short: those of them whose newest tokens have
    no page yet. waiting: the policy's queue. inflight: prefixes that are being computed.
    track_of, of_request: what is live, in the order it came. num_rows, num_due, num_adapted: how many of them
    are rows of batches, have deadlines, have adapters.
    """

    def __init__(self, config: SchedulerConfig, arena: Arena, admission: Admission, policy: Policy) -> None:
        self._config = config
        self._arena = arena
        self._admission = admission
        self._policy = policy
        self.running: list[Track] = []
        self.decoding: list[Track] = []
        self.prefilling: list[Track] = []
        self.short: dict[Track, None] = {}
        self.waiting = policy.queue()
        if config.adapter_cluster is not None:
            self.waiting = AdapterClusters(self.waiting, config.adapter_cluster)
        self.inflight = PrefixesInFlight(arena.page_size)
        self.track_of: dict[Sequence, Track] = {}
        self.of_request: dict[str, list[Track]] = {}
        self._parked: dict[str, list[Track]] = {}
        self.num_preemptions = 0
        self.num_rows = self.num_due = self.num_adapted = 0

    @property
    def num_live(self) -> int:
        """Running sequences of live requests: the first so many of `running`."""
        return bisect_left(self.running, True, key=_IS_BATCH)

    def add(self, tracks: list[Track]) -> None:
        """Take in the sequences of a new request; all but the first are parked."""
        request_id = tracks[0].seq.request.request_id
        for track in tracks:
            self.track_of[track.seq] = track
            self._count(track, 1)
            self._policy.added(track)
        self.of_request[request_id] = tracks
        self.waiting.push(tracks[0])
        if len(tracks) > 1:
            self._parked[request_id] = tracks[1:]

    def start(self, track: Track, now: float) -> None:
        """Let a waiting sequence run, which has its pages."""
        seq = track.seq
        self.waiting.remove(track)
        if seq.num_preemptions == 0:
            self._policy.admitted(track, now)
            seq.num_cached = seq.num_computed
            self._arena.tree.count_query(seq.num_prompt, seq.num_cached)
        insort(self.running, track, key=_KEY)
        insort(self.prefilling if seq.is_prefilling else self.decoding, track, key=_KEY)
        seq.status = SequenceStatus.RUNNING
        if seq.num_uncomputed > 1:
            self.inflight.update(track)

    def grown(self, track: Track) -> None:
        """A running sequence has new tokens, or its prompt is computed further."""
        seq = track.seq
        if len(seq.tokens) > track.capacity:
            self.short[track] = None
        if not seq.is_prefilling and track in self.prefilling:
            self.prefilling.remove(track)
            insort(self.decoding, track, key=_KEY)

    def preempt(self, track: Track) -> None:
        """Take a running sequence's pages and put it back among the waiting, ahead of later ones."""
        self._vacate(track, keep=True)
        seq = track.seq
        seq.num_computed = 0
        seq.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        self.num_preemptions += 1
        self.waiting.push(track)

    def is_forking(self, seq: Sequence) -> bool:
        """Whether siblings wait for the prompt of this one, and it has computed it."""
        return seq.request.request_id in self._parked and seq.num_computed >= seq.num_prompt

    def fork(self, seq: Sequence) -> None:
        """Let the siblings in."""
        for sibling in self._parked.pop(seq.request.request_id):
            self.waiting.push(sibling)

    def retire(
        self, track: Track, reason: FinishReason, stop_reason: str | int | None, *, keep: bool
    ) -> None:
        """End a live sequence, wherever it is. keep: its KV is complete and worth caching."""
        seq = track.seq
        request_id = seq.request.request_id
        parked = self._parked.get(request_id, [])
        if seq.status is SequenceStatus.RUNNING:
            self._vacate(track, keep=keep, num_kept=self._policy.num_kept(track))
        elif track in parked:
            parked.remove(track)
        else:
            self.waiting.remove(track)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        del self.track_of[seq]
        self._count(track, -1)
        siblings = self.of_request[request_id]
        siblings.remove(track)
        if len(parked) == len(siblings) and parked:
            # The one that was to compute the prompt is gone: the next takes its place.
            self.waiting.push(parked.pop(0))
        if not parked:
            self._parked.pop(request_id, None)
        if not siblings:
            del self.of_request[request_id]
            if not self._config.enable_prefix_caching and track.namespace is not None:
                self._arena.tree.drop(track.namespace)
        self._policy.finished(track)

    def _count(self, track: Track, change: int) -> None:
        self.num_rows += change if track.is_batch else 0
        self.num_due += change if track.due is not None else 0
        self.num_adapted += change if track.seq.adapter is not None else 0

    def check(self) -> None:
        """Assert the laws of the queues. O(sequences); for tests."""
        running = self.running
        num_parked = sum(map(len, self._parked.values()))
        assert len(running) + len(self.waiting) + num_parked == len(self.track_of)
        assert sum(map(len, self.of_request.values())) == len(self.track_of)
        assert running == sorted(running, key=_KEY)
        assert self.decoding == [track for track in running if not track.seq.is_prefilling]
        assert self.prefilling == [track for track in running if track.seq.is_prefilling]
        assert self.short.keys() == {track for track in running if track.seq.num_tokens > track.capacity}
        assert [t.is_batch for t in running] == sorted(t.is_batch for t in running), "rows come last"
        assert self.num_rows == sum(track.is_batch for track in self.track_of.values())
        assert self.num_due == sum(track.due is not None for track in self.track_of.values())
        for track in self.inflight.tracks:
            assert track in running, f"{track.seq!r} does not run"
            assert track.seq.num_uncomputed > 1, f"{track.seq!r} would hold others back while it decodes"
        assert len(running) <= self._config.max_num_seqs
        for track in self.track_of.values():
            seq = track.seq
            is_running = seq.status is SequenceStatus.RUNNING
            assert is_running == (track in running) == bool(seq.pages)
            assert not is_running or seq.num_computed <= track.capacity
            assert track.capacity == len(seq.pages) * self._arena.page_size
            assert (track.adapter is not None) == (is_running and seq.adapter is not None)

    def _vacate(self, track: Track, *, keep: bool, num_kept: int | None = None) -> None:
        """Take a running sequence's pages and adapter."""
        self._admission.vacate(track, keep=keep and self._config.enable_prefix_caching, num_kept=num_kept)
        self.inflight.remove(track)
        self.running.remove(track)
        (self.prefilling if track in self.prefilling else self.decoding).remove(track)
        self.short.pop(track, None)
