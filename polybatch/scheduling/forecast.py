"""What a request with deadlines is told at its arrival: when its tokens will come, and whether in time.

The forecast plays out, in time instead of steps, what is known now: who runs gives back pages and slots when
its expected output is there; who waits ahead gets them in the policy's order, and where many wait, neighbours
together; prompts are computed one after the other at the rate that steps have room for. What arrives later is
not known: under the policies that let later ones ahead, the answer is as good as the future is quiet.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import islice
from math import inf
from operator import attrgetter

from polybatch.memory.arena import Arena
from polybatch.scheduling.admission import Admission
from polybatch.scheduling.deadlines import Due
from polybatch.scheduling.live_tracks import LiveTracks
from polybatch.scheduling.policies import Policy
from polybatch.scheduling.track import Track

MAX_AHEAD = 1024
"""Waiting requests that are looked at; of more the rest is taken to be like these."""

MAX_PARTIES = 32
"""Into so many parties of neighbours they are put where there are more."""

_num_tokens = attrgetter("seq.num_prompt")
_num_expected = attrgetter("num_expected")


@dataclass(frozen=True, slots=True)
class AdmissionAnswer:
    """Told at arrival. ttft_s, e2e_s: seconds from arrival to the first and the last token, as predicted.

    tpot_s: per further token. missed: names of the deadlines that will not be met.
    """

    ttft_s: float
    tpot_s: float
    e2e_s: float
    missed: tuple[str, ...] = ()

    @property
    def is_met(self) -> bool:
        """Whether all deadlines will be met."""
        return not self.missed


@dataclass(frozen=True, slots=True)
class Party:
    """Waiting neighbours who are taken to be alike.

    num_tokens, num_pages: all that they have to compute and will be given. num_expected: of output, the mean.
    """

    size: int
    num_tokens: int
    num_pages: int
    num_expected: float


class Forecast:
    """Predicts what a request that has just begun to wait will see."""

    def __init__(
        self, arena: Arena, admission: Admission, tracks: LiveTracks, policy: Policy, max_seqs: int
    ) -> None:
        self._arena = arena
        self._admission = admission
        self._tracks = tracks
        self._pace = policy.pace
        self._max_seqs = max_seqs

    def answer(self, track: Track, due: Due, now: float) -> AdmissionAnswer:
        """For a track that waits and its deadlines. O(running + waiting), bounded."""
        first_s, last_s = self._play(self._ahead(track), track)
        waited_s = now - due.arrival_s
        ttft_s, e2e_s = waited_s + first_s, waited_s + last_s
        tick_s = (last_s - first_s) / max(1, track.num_expected - 1)
        missed = []
        if ttft_s > due.first_s - due.arrival_s:
            missed.append("ttft")
        if tick_s > due.pace_s:
            missed.append("tpot")
        if e2e_s > due.last_s - due.arrival_s:
            missed.append("e2e")
        return AdmissionAnswer(ttft_s, tick_s, e2e_s, tuple(missed))

    def _ahead(self, track: Track) -> list[Track]:
        """Who waits and is admitted before it."""
        ahead = []
        for other in islice(self._tracks.waiting.head(MAX_AHEAD), MAX_AHEAD):
            if other is track:
                break
            ahead.append(other)
        return ahead

    def _play(self, ahead: list[Track], track: Track) -> tuple[float, float]:
        """Seconds from now to the track's first token, and to its last."""
        pace, tracks = self._pace, self._tracks
        live = [other for other in tracks.running if not other.is_batch or track.is_batch]
        computing = sum(other.seq.num_uncomputed for other in live if other.seq.is_prefilling)
        parties = [*self._parties(ahead), self._party([track])]
        queued = sum(party.num_tokens for party in parties[:-1]) * self._scale(len(ahead))
        backlog_s = pace.prefill_s(computing + round(queued) + track.seq.num_tokens)
        tick_s = max(pace.mean_s, pace.decode_s(min(self._max_seqs, len(live) + len(ahead) + 1)))
        # While prompts are computed decodes come at the pace of full steps.
        busy_tick_s = max(tick_s, pace.full_s)

        def ends_s(num_tokens: float, begin: float = 0.0) -> float:
            busy_s = min(num_tokens * busy_tick_s, max(0.0, backlog_s - begin))
            return begin + busy_s + (num_tokens - busy_s / busy_tick_s) * tick_s

        ends: list[tuple[float, int, int]] = []
        for other in live:
            left = max(1, other.num_expected - other.seq.num_output)
            ends.append((ends_s(left), len(other.seq.pages), 1))
        heapq.heapify(ends)
        pages, slots = self._arena.num_available, self._max_seqs - len(live)
        pages += sum(
            len(other.seq.pages) for other in tracks.running if other.is_batch and not track.is_batch
        )
        free_s, prefill_end = 0.0, pace.prefill_s(computing) if computing else 0.0
        # As few as an eighth of what runs do not start by themselves.
        grain = max(1, len(live) // 8)
        for party in parties:
            left = party.size
            while left:
                room = min(left, slots, pages * party.size // party.num_pages)
                if room < min(left, grain) and ends:
                    free_s, given, ended = heapq.heappop(ends)
                    pages, slots = pages + given, slots + ended
                    continue
                num = room if room > 0 else left
                wanted = party.num_pages * num // party.size
                pages, slots, left = pages - wanted, slots - num, left - num
                num_tokens = party.num_tokens * num // party.size
                prefill_end = max(prefill_end, free_s) + pace.prefill_s(num_tokens)
                heapq.heappush(ends, (ends_s(party.num_expected, prefill_end), wanted, num))
        prefill_end *= self._scale(len(ahead))
        return prefill_end, ends_s(track.num_expected - 1, prefill_end)

    def _parties(self, ahead: list[Track]) -> list[Party]:
        size = -(-len(ahead) // MAX_PARTIES)
        return [self._party(ahead[at : at + size]) for at in range(0, len(ahead), size or 1)]

    def _party(self, tracks: list[Track]) -> Party:
        size = len(tracks)
        num_pages = sum(map(self._admission.num_wanted, tracks))
        return Party(size, sum(map(_num_tokens, tracks)), num_pages, sum(map(_num_expected, tracks)) / size)

    def _scale(self, num_ahead: int) -> float:
        """By how much more waits than was looked at."""
        return max(1.0, len(self._tracks.waiting) / MAX_AHEAD) if num_ahead == MAX_AHEAD else 1.0


def told(answer: AdmissionAnswer, due: Due) -> str:
    """What a refused request is told: the deadlines that it would miss, and what is predicted instead."""
    limits = {"ttft": due.first_s - due.arrival_s, "tpot": due.pace_s, "e2e": due.last_s - due.arrival_s}
    found = {"ttft": answer.ttft_s, "tpot": answer.tpot_s, "e2e": answer.e2e_s}
    missed = ", ".join(
        f"{name} of {1000 * limits[name]:.4g} ms would be {1000 * found[name]:.4g} ms"
        for name in answer.missed if limits[name] < inf
    )  # fmt: skip
    return f"the deadlines cannot be met now: {missed}; allow more time, or send it when less is to do"
