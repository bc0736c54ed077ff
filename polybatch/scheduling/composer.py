"""A step, composed: decodes, prefill chunks of those that run, admissions, and who yields for them.

Stall-free batching: every step carries the next token of every sequence that decodes; then, up to the prefill
budget, chunks of running prefills; then admissions in the policy's order. Sequences that run out of pages
preempt others, who are recomputed later (mostly from the prefix tree, where their pages stay until they are
needed). Rows of batches come last under every policy, and are preempted as well where a live request waits
for a slot or for pages.
Source: Sarathi-Serve (Agrawal et al. 2024) for the step, vLLM (Kwon et al. 2023) for recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from math import inf
from operator import attrgetter

from polybatch.config import SchedulerConfig
from polybatch.errors import EngineError
from polybatch.memory.arena import Arena
from polybatch.memory.prefix_tree import MatchResult
from polybatch.scheduling.adapter_clusters import AdapterClusters
from polybatch.scheduling.admission import Admission, PlanDraft
from polybatch.scheduling.budget import StepSoFar
from polybatch.scheduling.costs import StepCosts
from polybatch.scheduling.live_tracks import LiveTracks
from polybatch.scheduling.making_way import make_way
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan, decode_chunks
from polybatch.scheduling.policies import Policy
from polybatch.scheduling.row_slack import RowSlack
from polybatch.scheduling.track import Track

_KEY, _SEQ = attrgetter("key"), attrgetter("seq")

MAX_HELD = 64
"""Waiting sequences passed over per step because a running one computes their prefix."""

PREFETCH_DEPTH = 8
"""Waiting sequences whose adapters are prefetched."""

MAX_PREFETCHES = 2
"""Prefetched adapters per step: their loads delay it."""


class Composer:
    """Makes plans; what runs and waits is in `LiveTracks`, what a policy decides in `Policy`."""

    def __init__(
        self,
        config: SchedulerConfig,
        arena: Arena,
        admission: Admission,
        policy: Policy,
        tracks: LiveTracks,
        costs: StepCosts | None = None,
    ) -> None:
        self._config = config
        self._arena = arena
        self._admission = admission
        self._policy = policy
        self._tracks = tracks
        self._slack = None if costs is None else RowSlack(config.service, arena.page_size, costs)
        self._blocked: tuple[Track, int, int] | None = None
        """Who did not fit last, and the state of the pages then."""

    def compose(self, now: float) -> StepPlan | None:
        """The next step; None when nothing waits or runs. Pages in the plan are already taken."""
        tracks = self._tracks
        self._policy.begin(now)
        draft = PlanDraft(now)
        is_live_waiting = make_way(
            tracks, self._config, self._admission, self._policy, lambda track: self._preempt(track, draft)
        )
        self._plan_chunks(draft, is_live_waiting=is_live_waiting)
        if not draft.chunks:
            return None
        self._plan_prefetches(draft)
        if draft.copy_sources:
            self._arena.tree.release(draft.copy_sources)
        return StepPlan(
            chunks=tuple(draft.chunks),
            num_decodes=draft.num_decodes,
            copies=tuple(draft.copies),
            loads=tuple(draft.loads),
            resident=draft.resident,
            preempted=tuple(draft.preempted),
        )

    def _plan_chunks(self, draft: PlanDraft, *, is_live_waiting: bool) -> None:
        """Fill the step. is_live_waiting: beside rows of batches that run."""
        tracks = self._tracks
        num_made_way = len(draft.preempted)
        if self._slack is not None and tracks.num_rows:
            self._plan_beside_rows(self._slack, draft, num_made_way)
            return
        prefills = self._plan_all_decodes(draft)
        if prefills or len(tracks.waiting):
            self._plan_prefill_work(prefills, draft, num_made_way, is_live_waiting=is_live_waiting)

    def _plan_beside_rows(self, slack: RowSlack, draft: PlanDraft, num_made_way: int) -> None:
        """Live requests as if they were alone; rows of batches get the time that this leaves of the step."""
        tracks, policy, now = self._tracks, self._policy, draft.now
        prefills = policy.prefills(self._plan_decodes(islice(tracks.running, tracks.num_live), draft), now)
        budget = policy.prefill_budget(self._so_far(draft, prefills))
        budget = self._plan_prefills(prefills, budget, draft)
        if len(draft.preempted) == num_made_way:
            budget = self._plan_admissions(budget, draft, is_live_only=True)
        num_live = tracks.num_live
        limit_s = slack.limit_s(draft, tracks)
        is_alone = not draft.chunks
        rows = slack.decodes(draft, tracks.running[num_live:], limit_s, at_least=is_alone)
        # Rows that others preempt meanwhile are left out.
        prefills = policy.prefills(self._plan_decodes((row for row in rows if row.seq.pages), draft), now)
        step = self._so_far(draft, prefills, limit_s)
        budget = min(budget, slack.prefill_budget(policy, step, at_least=is_alone))
        budget = self._plan_prefills(prefills, budget, draft)
        if not draft.preempted and all(track.is_batch for track in tracks.waiting.head(1)):
            self._plan_admissions(budget, draft, is_live_only=False)

    def _so_far(self, draft: PlanDraft, prefills: list[Track], limit_s: float = inf) -> StepSoFar:
        tracks = self._tracks
        return StepSoFar(draft, tracks.track_of, prefills, tracks.waiting, tracks.num_due, limit_s)

    def _plan_prefill_work(
        self, prefills: list[Track], draft: PlanDraft, num_made_way: int, *, is_live_waiting: bool
    ) -> None:
        """Spend the prefill budget: on live prefills, on admissions, and then on rows that make way."""
        now = draft.now
        late: list[Track] = []
        if len(prefills) > 1 or is_live_waiting:
            rows = [track for track in prefills if track.is_batch]
            live = prefills[: len(prefills) - len(rows)]
            live, rows = self._policy.prefills(live, now), self._policy.prefills(rows, now)
            prefills, late = (live, rows) if is_live_waiting else (live + rows, [])
        budget = self._policy.prefill_budget(self._so_far(draft, prefills + late))
        budget = self._plan_prefills(prefills, budget, draft)
        # What a preemption freed belongs to those that run; admitting now would only preempt again.
        if len(draft.preempted) == num_made_way:
            budget = self._plan_admissions(budget, draft, is_live_only=is_live_waiting)
        self._plan_prefills(late, budget, draft)

    def _plan_all_decodes(self, draft: PlanDraft) -> list[Track]:
        """Begin a step with a token for each sequence that decodes; returns those that prefill, in order."""
        tracks = self._tracks
        if tracks.short:
            self._grow_all(draft)
        self._add_decodes(tracks.decoding, draft)
        return list(tracks.prefilling)

    def _plan_decodes(self, running: Iterable[Track], draft: PlanDraft) -> list[Track]:
        """Plan one token for each of these that decodes; returns those that prefill, in order."""
        prefills: list[Track] = []
        decoding: list[Track] = []
        # Preemption takes from the rest of this list, so nothing planned here is ever a victim.
        for track in running:
            seq = track.seq
            num_tokens, start = len(seq.tokens), seq.num_computed
            if num_tokens > track.capacity and not self._grow(track, num_tokens, draft):
                break
            is_decoding = num_tokens - start == 1 and start >= seq.num_prompt
            (decoding if is_decoding else prefills).append(track)
        self._add_decodes(decoding, draft)
        return prefills

    def _add_decodes(self, decoding: list[Track], draft: PlanDraft) -> None:
        """Put the newest token of each of these in the step; they have their pages."""
        is_leading = len(draft.chunks) == draft.num_decodes
        draft.chunks.extend(decode_chunks(list(map(_SEQ, decoding))))
        if is_leading:
            draft.num_decodes = len(draft.chunks)
        if self._tracks.num_adapted:
            for track in decoding:
                if track.adapter is not None:
                    draft.resident[track.adapter.ref.digest] = track.adapter.pages

    def _plan_prefills(self, tracks: list[Track], budget: int, draft: PlanDraft) -> int:
        """Plan chunks of prefills, in order; returns what is left of the budget."""
        for track in tracks:
            if budget == 0:
                break
            budget -= self._plan_prefill(track, budget, draft)
        return budget

    def _plan_prefill(self, track: Track, budget: int, draft: PlanDraft) -> int:
        """Plan the next chunk of a prefill; returns its tokens."""
        seq = track.seq
        start = seq.num_computed
        num_tokens = len(seq.tokens)
        n_new = min(num_tokens - start, budget)
        logits = LogitRows.LAST if start + n_new == num_tokens else LogitRows.NONE
        if track.is_scoring:
            # After a preemption, prompt logits that have been delivered are not asked for again.
            logits = LogitRows.ALL
            if start < track.num_scored:
                logits = LogitRows.NONE
                n_new = min(n_new, track.num_scored - start)
            elif self._config.max_scored_tokens is not None:
                room = self._config.max_scored_tokens - draft.num_scored
                if room <= 0:
                    return 0
                n_new = min(n_new, room)
                draft.num_scored += n_new
        draft.chunks.append(Chunk(seq, start, n_new, logits))
        if track.adapter is not None:
            draft.resident[track.adapter.ref.digest] = track.adapter.pages
        return n_new

    def _plan_admissions(self, budget: int, draft: PlanDraft, *, is_live_only: bool) -> int:
        """Admit who waits, as far as slots, pages and the budget go; returns what is left of it."""
        tracks = self._tracks
        running, waiting, inflight = tracks.running, tracks.waiting, tracks.inflight
        room = self._config.max_num_seqs - len(running)
        if budget == 0 or room == 0 or not len(waiting):
            return budget
        num_held = 0
        head: Iterable[Track] = waiting.head(room + MAX_HELD)
        if isinstance(waiting, AdapterClusters):
            head = waiting.to_admit(room + MAX_HELD, running)
        for track in head:
            if budget == 0 or room == 0 or num_held > MAX_HELD or (is_live_only and track.is_batch):
                break
            if self._blocked == (track, *self._room_state()):
                break
            match = None if inflight.is_held(track) else self._lookup(track)
            if match is None:
                num_held += 1
                continue
            if not self._policy.may_admit(track, match, running) and running:
                break
            if not self._admission.claim(track, match, draft, is_alone=not running):
                if not running:
                    raise EngineError(f"{track.seq!r} was accepted and does not fit an empty pool")
                self._blocked = (track, *self._room_state())
                break
            tracks.start(track, draft.now)
            room -= 1
            budget -= self._plan_prefill(track, budget, draft)
        return budget

    def _room_state(self) -> tuple[int, int]:
        """While this stands still, a sequence that did not fit does not fit."""
        return self._arena.pool.num_releases, self._arena.tree.num_inserts

    def _lookup(self, track: Track) -> MatchResult | None:
        """What is cached for a waiting track; None if a running sequence is computing more of it."""
        if track.namespace is None or track.is_scoring:
            return MatchResult()
        match = self._arena.tree.match(track.namespace, track.cache_keys)
        return None if self._tracks.inflight.hold(track, match) else match

    def _plan_prefetches(self, draft: PlanDraft) -> None:
        """Load adapters of the pinned and of the first who wait before they are needed."""
        tracks = self._tracks
        waiting = [track.seq.adapter for track in tracks.waiting.head(PREFETCH_DEPTH)]
        pinned = self._arena.adapters.pinned
        if pinned or any(waiting):
            wanted = [*pinned.values(), *(ref for ref in waiting if ref is not None)]
            self._admission.prefetch(wanted, MAX_PREFETCHES, len(tracks.running), draft)

    def _grow_all(self, draft: PlanDraft) -> None:
        """Give every running sequence pages for all its tokens; some may have to yield."""
        short = self._tracks.short
        if self._admission.grow_each(short):
            short.clear()
            return
        # Whoever needs pages may preempt those after it.
        for track in sorted(short, key=_KEY):
            if track in short:
                self._grow(track, track.seq.num_tokens, draft)

    def _grow(self, track: Track, num_tokens: int, draft: PlanDraft) -> bool:
        """Give a running sequence pages for all its tokens; False if it had to yield itself."""
        running = self._tracks.running
        while not self._admission.grow(track, num_tokens):
            if len(running) == 1:
                raise EngineError(f"{track.seq!r} was accepted and does not fit the pool alone")
            others = running[running.index(track) + 1 :]
            self._preempt(self._policy.victim(others) if others else track, draft)
            if not others:
                return False
        self._tracks.short.pop(track, None)
        return True

    def _preempt(self, track: Track, draft: PlanDraft) -> None:
        self._tracks.preempt(track)
        draft.preempted.append(track.seq)
