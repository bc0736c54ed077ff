"""The scheduler: what runs in the next step, and what follows from a step's tokens.

Stall-free batching: every step carries the next token of every sequence that decodes; then, up to the
token budget, prefill chunks of running sequences; then admissions in the policy's order. Sequences
that run out of pages preempt the last in that order, which is recomputed later (mostly from the
prefix tree, where its pages stay until they are needed). Rows of batches come last under every policy,
and are preempted as well where a live request waits for a slot or for pages.

Why every accepted request finishes: the first in order is never preempted by another, always gets its
decode or the first share of the prefill budget, and fits the pool alone (checked at the door). For rows of
batches this holds while no live request waits.

No torch, no threads, no clock: time is an argument. `plan` and `commit` alternate. `abort` and `finish`
may come at any moment except while an executor still reads the pages of a plan's sequences; what they
end is left out of the commit. A plan that could not be carried out goes to `discard` instead.

Planning may run one step ahead of the device: a commit with PENDING tokens moves everything on but their
values, the next plan is made, and `settle` brings the values. Only a stop token is then seen a step
late. Pages freed meanwhile may be handed out at once where the device works in order.
Source: Sarathi-Serve (Agrawal et al. 2024) for the step, vLLM (Kwon et al. 2023) for recomputation.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import attrgetter

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.errors import ConfigError, EngineError, RequestError
from polybatch.memory.arena import Arena
from polybatch.memory.prefix_tree import MatchResult
from polybatch.request import AdapterRef, FinishReason, Request, Sequence, SequenceStatus
from polybatch.scheduling.admission import Admission, PlanDraft
from polybatch.scheduling.fairness import queue_for
from polybatch.scheduling.inflight import PrefixesInFlight
from polybatch.scheduling.making_way import make_way
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan, StepResult
from polybatch.scheduling.policies import policy_named
from polybatch.scheduling.track import SchedulerStats, Track, salt_number

MIN_PREFILL_TOKENS = 32
"""Prefill tokens a step keeps room for however many sequences decode, so that prompts never starve."""

MAX_HELD = 64
"""Waiting sequences passed over per step because a running one computes their prefix."""

PREFETCH_DEPTH = 8
"""Waiting sequences whose adapters are prefetched."""

MAX_PREFETCHES = 2
"""Prefetched adapters per step: their loads delay it."""

_KEY = attrgetter("key")


class Scheduler:
    """Owns all live sequences and the page pool's bookkeeping."""

    def __init__(self, config: SchedulerConfig, pool: PoolSpec, namespace: str = "") -> None:
        """namespace: whatever else the KV depends on, such as model and KV precision; constant."""
        self._config = config
        self._arena = Arena(pool, config.reserve_pages)
        self._admission = Admission(self._arena, config.max_model_len)
        self._policy = policy_named(config.policy)
        self._namespace = namespace
        self._running: list[Track] = []
        self._waiting = queue_for(config.policy)
        self._inflight = PrefixesInFlight(pool.page_size)
        self._track_of: dict[Sequence, Track] = {}
        self._live: dict[str, list[Track]] = {}
        self._parked: dict[str, list[Track]] = {}
        """Siblings of n > 1 that wait for the KV of their prompt."""
        self._blocked: tuple[Track, int, int] | None = None
        self._order = 0
        self._num_preemptions = 0
        self._num_prefill_tokens = 0
        self._num_output_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._track_of)

    @property
    def arena(self) -> Arena:
        """Its pages, to be looked at only."""
        return self._arena

    def live(self) -> Iterable[Sequence]:
        """All sequences that wait or run, in the order they came."""
        return self._track_of.keys()

    def add(self, request: Request, now: float) -> list[Sequence]:
        """Accept a request: `params.n` waiting sequences.

        All but the first are admitted once the first has computed the prompt's KV, and share it.
        Raises RequestError if it could not be served even alone, or its id is in use.
        """
        request_id = request.request_id
        if request_id in self._live:
            raise RequestError(f"request_id {request_id!r} is in use; ids must be unique", field="request_id")
        max_pages = self._admission.max_pages(request)
        num_shared = self._num_shared(request)
        salt = salt_number(request.cache_salt) if num_shared else 0
        namespace = self._namespace_of(request)
        tracks = []
        for index in range(request.params.n):
            seq = Sequence(request, index)
            track = Track(seq, self._policy(request, self._order), namespace, max_pages)
            track.num_shared, track.salt = num_shared, salt
            self._order += 1
            self._track_of[seq] = track
            tracks.append(track)
        self._live[request_id] = tracks
        self._waiting.push(tracks[0])
        if len(tracks) > 1:
            self._parked[request_id] = tracks[1:]
        return [track.seq for track in tracks]

    def abort(self, request_id: str) -> list[Sequence]:
        """End all sequences of a request and free their pages at once; empty if it is not live."""
        tracks = list(self._live.get(request_id, ()))
        # Parked siblings first: they must not be promoted on the way out.
        for track in reversed(tracks):
            self._retire(track, FinishReason.ABORT, None, keep=False)
        return [track.seq for track in tracks]

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a sequence on the engine's word, for example at a stop string.

        For a sequence that has just ended by itself only the reasons change: a stop string in the last
        allowed token is a stop.
        """
        track = self._track_of.get(seq)
        if track is None:
            seq.finish_reason, seq.stop_reason = reason, stop_reason
            return
        self._retire(track, reason, stop_reason, keep=reason in (FinishReason.STOP, FinishReason.LENGTH))

    def plan(self, now: float) -> StepPlan | None:
        """Compose the next step; None when nothing waits or runs. Pages in the plan are already taken."""
        draft = PlanDraft()
        is_live_waiting = make_way(
            self._waiting, self._running, self._config, self._admission, lambda t: self._preempt(t, draft)
        )
        num_made_way = len(draft.preempted)
        prefills = self._plan_decodes(draft)
        late = [track for track in prefills if track.is_batch] if is_live_waiting else []
        budget = self._prefill_budget(len(draft.chunks))
        budget = self._plan_prefills(prefills[: len(prefills) - len(late)], budget, draft)
        # What a preemption freed belongs to those that run; admitting now would only preempt again.
        if len(draft.preempted) == num_made_way:
            budget = self._plan_admissions(budget, draft, is_live_only=is_live_waiting)
        self._plan_prefills(late, budget, draft)
        if not draft.chunks:
            return None
        self._plan_prefetches(draft)
        if draft.copy_sources:
            self._arena.tree.release(draft.copy_sources)
        return StepPlan(
            chunks=tuple(draft.chunks),
            copies=tuple(draft.copies),
            loads=tuple(draft.loads),
            resident=draft.resident,
            preempted=tuple(draft.preempted),
        )

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Take a step's tokens in; returns the sequences that it finished.

        A chunk that reaches its sequence's last token may bring any number of tokens: none leaves that
        token to be computed again, more than one needs that many tokens of KV in the chunk.
        Raises EngineError if the result does not fit the plan.
        """
        if len(result.tokens) != len(plan.chunks):
            raise EngineError(f"{len(result.tokens)} results were given for {len(plan.chunks)} chunks")
        finished = []
        track_of = self._track_of
        for chunk, new in zip(plan.chunks, result.tokens, strict=True):
            seq = chunk.seq
            track = track_of.get(seq)
            if track is None:  # ended while the step ran
                continue
            start, tokens = chunk.start, seq.tokens
            end = start + chunk.n_new
            is_last = end >= len(tokens)
            if not is_last and new:
                raise EngineError(f"{seq!r} was given tokens for a chunk that ends at {end}")
            reason = self._append(track, new) if new else None
            seq.num_computed = min(end, len(tokens) - 1) if is_last else end
            if start < seq.num_prompt or chunk.n_new > 1 or not is_last:
                self._commit_prefill(track, chunk)
            if reason is not None:
                last = tokens[-1]
                is_named = reason is FinishReason.STOP and last in seq.request.params.stop_token_ids
                self._retire(track, reason, last if is_named else None, keep=True)
                finished.append(seq)
        self._waiting.served(plan, result)
        return finished

    def settle(self, seq: Sequence, position: int, token: int) -> bool:
        """Put in the token that a commit left PENDING at `position`; True if it ends the sequence.

        A sequence that has just ended by its length ended at a stop token after all: its reasons change.
        """
        seq.tokens[position] = token
        request = seq.request
        is_stop = token in request.stop_token_ids and (
            position + 1 >= seq.num_prompt + request.params.min_tokens
        )
        if not is_stop or seq.finish_reason not in (None, FinishReason.LENGTH):
            return False
        was_live = seq in self._track_of
        self.finish(seq, FinishReason.STOP, token if token in request.params.stop_token_ids else None)
        return was_live

    def discard(self, plan: StepPlan) -> list[Sequence]:
        """Undo a plan that could not be carried out: end its sequences with ERROR, forget its loads."""
        tracks = [self._track_of[chunk.seq] for chunk in plan.chunks if chunk.seq in self._track_of]
        for track in tracks:
            self._retire(track, FinishReason.ERROR, None, keep=False)
        for load in plan.loads:
            self._arena.adapters.forget(load.adapter.digest)
        return [track.seq for track in tracks]

    def pin(self, ref: AdapterRef) -> None:
        """Keep an adapter resident from its first use or prefetch on.

        Raises ConfigError if some live request could then no longer be served.
        """
        if not self._admission.can_pin(ref, list(self._track_of.values())):
            raise ConfigError(
                f"pinning adapter {ref.name!r} takes {ref.num_pages:,} of {self._arena.pool.num_pages:,} "
                "pages and leaves too few for the requests that run: pin fewer adapters or raise memory"
            )
        self._arena.adapters.pin(ref)

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""
        self._arena.adapters.unpin(digest)

    def stats(self) -> SchedulerStats:
        arena = self._arena
        return SchedulerStats(
            num_running=len(self._running),
            num_waiting=len(self._track_of) - len(self._running),
            num_pages=arena.pool.num_pages,
            num_free_pages=arena.pool.num_free,
            num_kv_pages=arena.num_kv,
            num_adapter_pages=arena.adapters.num_pages,
            num_cached_pages=arena.pool.num_cached,
            num_resident_adapters=arena.adapters.num_resident,
            num_adapter_loads=arena.adapters.num_loads,
            num_prefix_query_tokens=arena.tree.num_query_tokens,
            num_prefix_hit_tokens=arena.tree.num_hit_tokens,
            num_preemptions=self._num_preemptions,
            num_prefill_tokens=self._num_prefill_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def check(self) -> None:
        """Assert the laws of queues and pages. O(pages + sequences); for tests."""
        running = self._running
        self._arena.check(track.seq.pages for track in self._track_of.values())
        num_parked = sum(map(len, self._parked.values()))
        assert len(running) + len(self._waiting) + num_parked == len(self._track_of)
        assert sum(map(len, self._live.values())) == len(self._track_of)
        assert running == sorted(running, key=_KEY)
        for track in self._inflight.tracks:
            assert track in running, f"{track.seq!r} does not run"
            assert track.seq.num_uncomputed > 1, f"{track.seq!r} would hold others back while it decodes"
        assert len(running) <= self._config.max_num_seqs
        for track in self._track_of.values():
            seq = track.seq
            is_running = seq.status is SequenceStatus.RUNNING
            assert is_running == (track in running) == bool(seq.pages)
            assert not is_running or seq.num_computed <= track.capacity
            assert track.capacity == len(seq.pages) * self._arena.page_size
            assert (track.adapter is not None) == (is_running and seq.adapter is not None)

    def _num_shared(self, request: Request) -> int:
        """Tokens in whole pages that are shared whatever the salt."""
        if not self._config.enable_prefix_caching:
            return 0
        return request.num_shared_tokens // self._arena.page_size * self._arena.page_size

    def _namespace_of(self, request: Request) -> str | None:
        if self._config.enable_prefix_caching:
            digest = "" if request.adapter is None else request.adapter.digest
            if self._num_shared(request):
                return f"shared:{self._namespace}/{digest}"
            return f"{self._namespace}/{digest}/{request.cache_salt}"
        # Siblings share through the same tree, in a namespace that ends with them.
        return f"fork/{request.request_id}" if request.params.n > 1 else None

    def _plan_decodes(self, draft: PlanDraft) -> list[Track]:
        """Plan one token for each sequence that decodes; returns those that prefill, in order."""
        prefills = []
        resident = draft.resident
        append = draft.chunks.append
        last = LogitRows.LAST
        # Preemption takes from the end of this list, so nothing planned here is ever a victim.
        for track in self._running:
            seq = track.seq
            num_tokens = len(seq.tokens)
            if num_tokens > track.capacity and not self._grow(track, num_tokens, draft):
                break
            start = seq.num_computed
            if num_tokens - start == 1 and start >= seq.num_prompt:
                append(Chunk(seq, start, 1, last))
                adapter = track.adapter
                if adapter is not None:
                    resident[adapter.ref.digest] = adapter.pages
            else:
                prefills.append(track)
        return prefills

    def _prefill_budget(self, num_decodes: int) -> int:
        """Prefill tokens of a step: what decodes leave, yet never less than a minimal chunk."""
        limit = self._config.max_num_batched_tokens
        return max(limit - num_decodes, min(MIN_PREFILL_TOKENS, limit))

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
        room = self._config.max_num_seqs - len(self._running)
        if budget == 0 or room == 0 or not len(self._waiting):
            return budget
        num_held = 0
        for track in self._waiting.head(room + MAX_HELD):
            if budget == 0 or room == 0 or num_held > MAX_HELD or (is_live_only and track.is_batch):
                break
            if self._blocked == (track, *self._room_state()):
                break
            match = None if self._inflight.is_held(track) else self._lookup(track)
            if match is None:
                num_held += 1
                continue
            if not self._admission.claim(track, match, draft, is_alone=not self._running):
                if not self._running:
                    raise EngineError(f"{track.seq!r} was accepted and does not fit an empty pool")
                self._blocked = (track, *self._room_state())
                break
            self._start(track)
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
        return None if self._inflight.hold(track, match) else match

    def _start(self, track: Track) -> None:
        seq = track.seq
        self._waiting.remove(track)
        if seq.num_preemptions == 0:
            self._waiting.admitted(track)
            seq.num_cached = seq.num_computed
            self._arena.tree.count_query(seq.num_prompt, seq.num_cached)
        insort(self._running, track, key=_KEY)
        seq.status = SequenceStatus.RUNNING
        if seq.num_uncomputed > 1:
            self._inflight.update(track)

    def _plan_prefetches(self, draft: PlanDraft) -> None:
        """Load adapters of the pinned and of the first who wait before they are needed."""
        waiting = [track.seq.adapter for track in self._waiting.head(PREFETCH_DEPTH)]
        pinned = self._arena.adapters.pinned
        if pinned or any(waiting):
            wanted = [*pinned.values(), *(ref for ref in waiting if ref is not None)]
            self._admission.prefetch(wanted, MAX_PREFETCHES, len(self._running), draft)

    def _grow(self, track: Track, num_tokens: int, draft: PlanDraft) -> bool:
        """Give a running sequence pages for all its tokens; False if it had to yield itself."""
        while not self._admission.grow(track, num_tokens):
            if len(self._running) == 1:
                raise EngineError(f"{track.seq!r} was accepted and does not fit the pool alone")
            victim = self._running[-1]
            self._preempt(victim, draft)
            if victim is track:
                return False
        return True

    def _preempt(self, track: Track, draft: PlanDraft) -> None:
        """Take a running sequence's pages and put it back among the waiting, ahead of later ones."""
        self._vacate(track, keep=True)
        seq = track.seq
        seq.num_computed = 0
        seq.num_preemptions += 1
        seq.status = SequenceStatus.WAITING
        self._num_preemptions += 1
        self._waiting.push(track)
        draft.preempted.append(seq)

    def _append(self, track: Track, new: tuple[int, ...]) -> FinishReason | None:
        """Append sampled tokens up to the first that ends the sequence."""
        tokens = track.seq.tokens
        for token in new:
            tokens.append(token)
            self._num_output_tokens += 1
            num_tokens = len(tokens)
            if token in track.stop_ids and num_tokens >= track.min_len:
                return FinishReason.STOP
            if num_tokens >= track.max_len:
                return FinishReason.LENGTH
        return None

    def _commit_prefill(self, track: Track, chunk: Chunk) -> None:
        """Let others find the pages that a prefill has filled."""
        seq = track.seq
        self._num_prefill_tokens += chunk.n_new
        if chunk.logits is LogitRows.ALL and track.is_scoring:
            track.num_scored = chunk.start + chunk.n_new
        request_id = seq.request.request_id
        is_forking = request_id in self._parked and seq.num_computed >= seq.num_prompt
        if track.namespace is not None:
            track.node = self._arena.tree.insert(
                track.namespace, track.cache_keys, seq.num_computed, seq.pages, track.node,
                with_partial=is_forking,
            )  # fmt: skip
            if seq.num_uncomputed > 1:
                self._inflight.update(track)
            else:
                self._inflight.remove(track)
        if is_forking:
            for sibling in self._parked.pop(request_id):
                self._waiting.push(sibling)

    def _vacate(self, track: Track, *, keep: bool) -> None:
        """Take a running sequence's pages and adapter. keep: its KV is complete and worth caching."""
        self._admission.vacate(track, keep=keep and self._config.enable_prefix_caching)
        self._inflight.remove(track)
        self._running.remove(track)

    def _retire(
        self, track: Track, reason: FinishReason, stop_reason: str | int | None, *, keep: bool
    ) -> None:
        """End a live sequence, wherever it is."""
        seq = track.seq
        request_id = seq.request.request_id
        parked = self._parked.get(request_id, [])
        if seq.status is SequenceStatus.RUNNING:
            self._vacate(track, keep=keep)
        elif track in parked:
            parked.remove(track)
        else:
            self._waiting.remove(track)
        seq.status = SequenceStatus.FINISHED
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        del self._track_of[seq]
        siblings = self._live[request_id]
        siblings.remove(track)
        if len(parked) == len(siblings) and parked:
            # The one that was to compute the prompt is gone: the next takes its place.
            self._waiting.push(parked.pop(0))
        if not parked:
            self._parked.pop(request_id, None)
        if not siblings:
            del self._live[request_id]
            if not self._config.enable_prefix_caching and track.namespace is not None:
                self._arena.tree.drop(track.namespace)
