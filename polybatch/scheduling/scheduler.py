"""The scheduler: what runs in the next step, and what follows from a step's tokens.

This file is what the engine calls, and what a step's tokens mean. `composer` makes the steps, `live_tracks`
holds who waits and who runs, `policies` decides who goes first, `admission` who gets pages.

Why every accepted request finishes: the first in order is never preempted by another, always gets its
decode or the first share of the prefill budget, and fits the pool alone (checked at the door). For rows of
batches this holds while no live request waits.

No torch, no threads, no clock: time is an argument. `plan` and `commit` alternate. `abort` and `finish`
may come at any moment except while an executor still reads the pages of a plan's sequences; what they
end is left out of the commit. A plan that could not be carried out goes to `discard` instead.

Planning may run one step ahead of the device: a commit with PENDING tokens moves everything on but their
values, the next plan is made, and `settle` brings the values. Only a stop token is then seen a step
late. Pages freed meanwhile may be handed out at once where the device works in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.errors import ConfigError, DeadlineError, EngineError, RequestError
from polybatch.memory.arena import Arena
from polybatch.request import AdapterRef, Deadlines, FinishReason, Request, Sequence
from polybatch.scheduling.admission import Admission
from polybatch.scheduling.composer import PREFETCH_DEPTH
from polybatch.scheduling.costs import StepCosts
from polybatch.scheduling.deadlines import deadlines_of
from polybatch.scheduling.forecast import AdmissionAnswer, Forecast, told
from polybatch.scheduling.live_tracks import LiveTracks
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan, StepResult
from polybatch.scheduling.policies import policy_named
from polybatch.scheduling.separate_steps import COMPOSERS
from polybatch.scheduling.track import SchedulerStats, Track, salt_number


class Scheduler:
    """Owns all live sequences and the page pool's bookkeeping."""

    def __init__(
        self,
        config: SchedulerConfig,
        pool: PoolSpec,
        namespace: str = "",
        *,
        costs: StepCosts | None = None,
    ) -> None:
        """namespace: whatever else the KV depends on, such as model and KV precision; constant.

        costs: predicts a step's time, for deadlines; None where nothing is known about it.
        """
        self._config = config
        self._costs = costs
        self._arena = Arena(pool, config.reserve_pages)
        self._admission = Admission(self._arena, config.max_model_len)
        self._policy = policy_named(config.policy)(config, self._arena, costs)
        self._namespace = namespace
        self._tracks = LiveTracks(config, self._arena, self._admission, self._policy)
        self._composer = COMPOSERS[config.batching](
            config, self._arena, self._admission, self._policy, self._tracks, costs
        )
        self._pace = self._policy.pace if self._policy.is_paced or costs is not None else None
        self._forecast: Forecast | None = None
        if costs is not None:
            self._forecast = Forecast(
                self._arena, self._admission, self._tracks, self._policy, config.max_num_seqs
            )
        self._order = 0
        self._num_prefill_tokens = 0
        self._num_output_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._tracks.track_of)

    @property
    def arena(self) -> Arena:
        """Its pages, to be looked at only."""
        return self._arena

    @property
    def is_planning(self) -> bool:
        """Whether rows of batches are worth having all at once; see `Policy`."""
        return self._policy.is_planning

    def num_to_begin(self, requests: SequenceOf[Request]) -> int:
        """How many of these requests to add before the next plan, if the others are added right after it.

        As many as have a step's tokens or take all slots, and some whose adapters are prefetched: the plan is
        the same, but for prefixes that they share. All of them where those that are left might have gone
        first, might be refused for who waits (refuse_late), or are mixtures, of unknown size as yet.
        """
        config = self._config
        is_any_order = not self._policy.is_by_arrival or config.adapter_cluster is not None
        is_mixed = any(request.adapter is not None and request.adapter.parts for request in requests)
        priorities = {request.priority for request in requests}
        if is_any_order or is_mixed or config.service.refuse_late or len(priorities) > 1:
            return len(requests)
        count = num_tokens = 0
        while count < min(len(requests), config.max_num_seqs) and num_tokens < config.max_num_batched_tokens:
            num_tokens += len(requests[count].prompt_token_ids)
            count += 1
        return min(len(requests), count + PREFETCH_DEPTH)

    def check_request(self, request: Request) -> None:
        """Raise RequestError if a request could not be served even alone."""
        self._admission.max_pages(request)

    def live(self) -> Iterable[Sequence]:
        """All sequences that wait or run, in the order they came."""
        return self._tracks.track_of.keys()

    def add(self, request: Request, now: float) -> list[Sequence]:
        """Accept a request: `params.n` waiting sequences.

        All but the first are admitted once the first has computed the prompt's KV, and share it.
        Raises RequestError if it could not be served even alone, or its id is in use; with refuse_late
        DeadlineError if its deadlines will not be met.
        """
        request_id = request.request_id
        if request_id in self._tracks.of_request:
            raise RequestError(f"request_id {request_id!r} is in use; ids must be unique", field="request_id")
        max_pages = self._admission.max_pages(request)
        num_shared = self._num_shared(request)
        salt = salt_number(request.cache_salt) if num_shared else 0
        namespace = self._namespace_of(request)
        tracks = []
        for index in range(request.params.n):
            seq = Sequence(request, index)
            track = Track(seq, self._policy.key(request, self._order, now), namespace, max_pages)
            track.due = self._policy.due(request, now)
            track.num_shared, track.salt = num_shared, salt
            self._order += 1
            tracks.append(track)
        self._tracks.add(tracks)
        if self._forecast is not None and self._costs is not None and self._costs.is_ready:
            self._answer(tracks[0], now)
        return [track.seq for track in tracks]

    def deadlines_of(self, request: Request) -> Deadlines | None:
        """A request's own deadlines, or those of its class."""
        return deadlines_of(request, self._config.service)

    def answer(self, request_id: str) -> AdmissionAnswer | None:
        """What was predicted for a live request at its arrival.

        None without deadlines, for rows of batches, or where nothing predicts (yet).
        """
        tracks = self._tracks.of_request.get(request_id)
        return tracks[0].answer if tracks else None

    def abort(self, request_id: str) -> list[Sequence]:
        """End all sequences of a request and free their pages at once; empty if it is not live."""
        tracks = list(self._tracks.of_request.get(request_id, ()))
        # Parked siblings first: they must not be promoted on the way out.
        for track in reversed(tracks):
            self._tracks.retire(track, FinishReason.ABORT, None, keep=False)
        return [track.seq for track in tracks]

    def finish(self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        """End a sequence on the engine's word, for example at a stop string.

        For a sequence that has just ended by itself only the reasons change: a stop string in the last
        allowed token is a stop.
        """
        track = self._tracks.track_of.get(seq)
        if track is None:
            seq.finish_reason, seq.stop_reason = reason, stop_reason
            return
        self._tracks.retire(
            track, reason, stop_reason, keep=reason in (FinishReason.STOP, FinishReason.LENGTH)
        )

    def plan(self, now: float) -> StepPlan | None:
        """Compose the next step; None when nothing waits or runs. Pages in the plan are already taken."""
        if self._pace is not None:
            self._pace.begin(now)
        return self._composer.compose(now)

    def to_abort(self, now: float) -> list[tuple[str, str]]:
        """Requests that the policy gives up, and what they are told; the caller is to end them."""
        return list(
            {track.seq.request.request_id: told for track, told in self._policy.to_abort(now)}.items()
        )

    def commit(self, plan: StepPlan, result: StepResult) -> list[Sequence]:
        """Take a step's tokens in; returns the sequences that it finished.

        A chunk that reaches its sequence's last token may bring any number of tokens: none leaves that
        token to be computed again, more than one needs that many tokens of KV in the chunk.
        Raises EngineError if the result does not fit the plan.
        """
        if len(result.tokens) != len(plan.chunks):
            raise EngineError(f"{len(result.tokens)} results were given for {len(plan.chunks)} chunks")
        finished: list[Sequence] = []
        track_of, short = self._tracks.track_of, self._tracks.short
        find, num_decodes, num_plain = track_of.get, plan.num_decodes, 0
        for chunk, new in zip(plan.chunks[:num_decodes], result.tokens, strict=False):
            seq = chunk[0]
            track = find(seq)
            if track is None:  # ended while the step ran
                continue
            end = chunk[1] + 1
            if len(new) == 1 and new[0] not in track.stop_ids and end + 1 < track.max_len:
                # What `_commit` does, in short.
                seq.num_computed = end
                seq.tokens += new
                num_plain += 1
                if end >= track.capacity:
                    short[track] = None
            else:
                self._commit(track, chunk, new, finished)
        self._num_output_tokens += num_plain
        for chunk, new in zip(plan.chunks[num_decodes:], result.tokens[num_decodes:], strict=True):
            track = find(chunk.seq)
            if track is not None:
                self._commit(track, chunk, new, finished)
        self._policy.served(plan, result)
        if self._pace is not None:
            self._pace.served(plan)
            if not track_of:
                self._pace.rest()
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
        was_live = seq in self._tracks.track_of
        self.finish(seq, FinishReason.STOP, token if token in request.params.stop_token_ids else None)
        return was_live

    def discard(self, plan: StepPlan) -> list[Sequence]:
        """Undo a plan that could not be carried out: end its sequences with ERROR, forget its loads."""
        tracks = [
            self._tracks.track_of[chunk.seq] for chunk in plan.chunks if chunk.seq in self._tracks.track_of
        ]
        for track in tracks:
            self._tracks.retire(track, FinishReason.ERROR, None, keep=False)
        for load in plan.loads:
            self._arena.adapters.forget(load.adapter.digest)
        return [track.seq for track in tracks]

    def pin(self, ref: AdapterRef) -> None:
        """Keep an adapter resident from its first use or prefetch on.

        Raises ConfigError if some live request could then no longer be served.
        """
        if not self._admission.can_pin(ref, list(self._tracks.track_of.values())):
            raise ConfigError(
                f"pinning adapter {ref.name!r} takes {ref.num_pages:,} of {self._arena.pool.num_pages:,} "
                "pages and leaves too few for the requests that run: pin fewer adapters or raise memory"
            )
        self._arena.adapters.pin(ref)

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""
        self._arena.adapters.unpin(digest)

    def stats(self) -> SchedulerStats:
        arena, tracks = self._arena, self._tracks
        return SchedulerStats(
            num_running=len(tracks.running),
            num_waiting=len(tracks.track_of) - len(tracks.running),
            num_pages=arena.pool.num_pages,
            num_free_pages=arena.pool.num_free,
            num_kv_pages=arena.num_kv,
            num_adapter_pages=arena.adapters.num_pages,
            num_cached_pages=arena.pool.num_cached,
            num_resident_adapters=arena.adapters.num_resident,
            num_adapter_loads=arena.adapters.num_loads,
            num_prefix_query_tokens=arena.tree.num_query_tokens,
            num_prefix_hit_tokens=arena.tree.num_hit_tokens,
            num_preemptions=tracks.num_preemptions,
            num_prefill_tokens=self._num_prefill_tokens,
            num_output_tokens=self._num_output_tokens,
        )

    def check(self) -> None:
        """Assert the laws of queues and pages. O(pages + sequences); for tests."""
        self._arena.check(track.seq.pages for track in self._tracks.track_of.values())
        self._tracks.check()

    def _answer(self, track: Track, now: float) -> None:
        """Predict what a new request will see, and refuse it where it is to be refused."""
        assert self._forecast is not None
        due = track.due
        if due is None or track.is_batch:
            return
        track.answer = answer = self._forecast.answer(track, due, now)
        if self._config.service.refuse_late and not answer.is_met:
            self.abort(track.seq.request.request_id)
            raise DeadlineError(told(answer, due), answer.ttft_s)

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

    def _commit(self, track: Track, chunk: Chunk, new: tuple[int, ...], finished: list[Sequence]) -> None:
        """Take in what one chunk brought; a sequence that it ends goes to `finished`."""
        seq, start = chunk.seq, chunk.start
        tokens, end = seq.tokens, start + chunk.n_new
        is_last = end >= len(tokens)
        if not is_last and new:
            raise EngineError(f"{seq!r} was given tokens for a chunk that ends at {end}")
        reason = self._append(track, new) if new else None
        seq.num_computed = min(end, len(tokens) - 1) if is_last else end
        self._tracks.grown(track)
        if start < seq.num_prompt or chunk.n_new > 1 or not is_last:
            self._commit_prefill(track, chunk)
        if reason is not None:
            last = tokens[-1]
            is_named = reason is FinishReason.STOP and last in seq.request.params.stop_token_ids
            self._tracks.retire(track, reason, last if is_named else None, keep=True)
            finished.append(seq)

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
        tracks = self._tracks
        is_forking = tracks.is_forking(seq)
        if track.namespace is not None:
            track.node = self._arena.tree.insert(
                track.namespace, track.cache_keys, seq.num_computed, seq.pages, track.node,
                with_partial=is_forking,
            )  # fmt: skip
            if seq.num_uncomputed > 1:
                tracks.inflight.update(track)
            else:
                tracks.inflight.remove(track)
        if is_forking:
            tracks.fork(seq)
