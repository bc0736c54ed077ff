"""Admission: may a sequence enter, what does it need, taking it and giving it back. No steps here.

A sequence enters with the pages of all its tokens and its adapter, or not at all, so a prompt is
never half admitted. A few pages (the watermark) are left for those already running, because an
admission that forces a preemption in the next step was no gain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from polybatch.errors import RequestError
from polybatch.memory.arena import Arena
from polybatch.memory.prefix_tree import MatchResult
from polybatch.request import AdapterRef, Request, Sequence
from polybatch.scheduling.plan import AdapterLoad, Chunk, PageCopy
from polybatch.scheduling.track import Track


@dataclass(slots=True)
class PlanDraft:
    """A plan while it is made, at the time `now`.

    copy_sources: pages that copies of this plan read, held until the plan is complete: loads of the same plan
    are carried out before the copies and must not land in them. num_scored: prompt tokens with logits.
    num_decodes: as in `StepPlan`.
    """

    now: float = 0.0
    chunks: list[Chunk] = field(default_factory=list)
    num_decodes: int = 0
    copies: list[PageCopy] = field(default_factory=list)
    loads: list[AdapterLoad] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    resident: dict[str, tuple[int, ...]] = field(default_factory=dict)
    copy_sources: list[int] = field(default_factory=list)
    num_scored: int = 0


class Admission:
    """Checks at the door; then pages and adapters of sequences from their start to their end."""

    def __init__(self, arena: Arena, max_model_len: int) -> None:
        self._arena = arena
        self._max_model_len = max_model_len
        self._watermark = max(1, arena.pool.num_pages // 100)

    def max_pages(self, request: Request) -> int:
        """Pages that a sequence of the request takes at most, adapter included.

        Raises RequestError if it could not be served even alone.
        """
        num_prompt = len(request.prompt_token_ids)
        limit = self._max_model_len
        if num_prompt == 0:
            raise RequestError("prompt has 0 tokens; it must have at least one", field="prompt")
        if num_prompt >= limit:
            raise RequestError(
                f"prompt has {num_prompt:,} tokens, max_model_len is {limit:,} and the output needs at "
                "least one: shorten the prompt or raise max_model_len",
                field="prompt",
            )
        if request.max_tokens < 1 or num_prompt + request.max_tokens > limit:
            raise RequestError(
                f"max_tokens is {request.max_tokens:,}; with a prompt of {num_prompt:,} tokens it must be "
                f"from 1 to {limit - num_prompt:,} (max_model_len is {limit:,}): lower max_tokens or "
                "raise max_model_len",
                field="max_tokens",
            )
        # The last token that is sampled never gets KV.
        kv = self._arena.pages_for(num_prompt + request.max_tokens - 1)
        adapter = request.adapter
        num_adapter = 0 if adapter is None else adapter.num_pages
        num_pages = self._arena.pool.num_pages
        num_pinned = self._num_pinned(None if adapter is None else adapter.digest)
        if kv + num_adapter + num_pinned > num_pages:
            raise RequestError(
                f"the request needs up to {kv + num_adapter:,} pages ({kv:,} for {num_prompt:,} prompt and "
                f"{request.max_tokens:,} output tokens, {num_adapter:,} for its adapter), the pool has "
                f"{num_pages - num_pinned:,} ({num_pinned:,} more hold pinned adapters): lower max_tokens, "
                "shorten the prompt or raise memory",
                field="max_tokens",
            )
        return kv + num_adapter

    def can_pin(self, ref: AdapterRef, tracks: list[Track]) -> bool:
        """Whether every live sequence could still run alone beside the pinned adapters and this one."""
        num_pages = self._arena.pool.num_pages
        if self._num_pinned(ref.digest) + ref.num_pages > num_pages:
            return False
        for track in tracks:
            own = track.seq.adapter
            digest = None if own is None else own.digest
            num_pinned = self._num_pinned(digest)
            if ref.digest != digest and ref.digest not in self._arena.adapters.pinned:
                num_pinned += ref.num_pages
            if track.max_pages + num_pinned > num_pages:
                return False
        return True

    def num_wanted(self, track: Track) -> int:
        """Pages that a waiting sequence is to be given at most."""
        ref = track.seq.adapter
        is_there = ref is None or self._arena.adapters.is_resident(ref.digest)
        num_adapter = 0 if ref is None or is_there else ref.num_pages
        return self._arena.pages_for(track.seq.num_tokens) + num_adapter

    def has_room(self, num_pages: int) -> bool:
        """Whether so many pages can be had besides the watermark."""
        return num_pages + self._watermark <= self._arena.num_available

    def claim(self, track: Track, match: MatchResult, draft: PlanDraft, *, is_alone: bool) -> bool:
        """Give a sequence its pages and its adapter, sharing and copying what `match` found.

        Returns False, with nothing changed, where there is no room. is_alone: nothing else runs,
        so that nothing needs the watermark.
        """
        arena = self._arena
        seq = track.seq
        ref = seq.adapter
        # What it will use is held first, so that making room cannot take it away.
        for page in match.pages:
            arena.pool.share(page)
        copy_page = match.copy_page
        if copy_page is not None:
            arena.pool.share(copy_page)
        if ref is not None and arena.adapters.is_resident(ref.digest):
            track.adapter = arena.adapters.acquire(ref.digest)
        num_own = arena.pages_for(seq.num_tokens) - len(match.pages)
        num_adapter = ref.num_pages if ref is not None and track.adapter is None else 0
        num_needed = num_own + num_adapter + (0 if is_alone else self._watermark)
        if copy_page is not None and arena.num_available < num_needed:
            arena.tree.release([copy_page])
            copy_page = None
        if arena.num_available < num_needed:
            arena.tree.release(reversed(match.pages))
            self._drop_adapter(track)
            return False
        own = self._take(num_own)
        if ref is not None and track.adapter is None:
            self._load(ref, self._take(num_adapter), draft)
            track.adapter = arena.adapters.acquire(ref.digest)
        seq.num_computed = len(match.pages) * arena.page_size
        if copy_page is not None:
            draft.copies.append(PageCopy(copy_page, own[0]))
            draft.copy_sources.append(copy_page)
            seq.num_computed += match.copy_tokens
        seq.pages = [*match.pages, *own]
        track.capacity = len(seq.pages) * arena.page_size
        track.node = match.node
        return True

    def _load(self, ref: AdapterRef, pages: list[int], draft: PlanDraft) -> None:
        """Make an adapter resident in fresh pages and tell the executor to fill them."""
        entry = self._arena.adapters.install(ref, pages)
        draft.loads.append(AdapterLoad(ref, entry.pages))

    def grow(self, track: Track, num_tokens: int) -> bool:
        """Give a running sequence pages for so many tokens; False, with nothing changed, without room."""
        seq = track.seq
        pages = self._arena.allocate(self._arena.pages_for(num_tokens) - len(seq.pages))
        if pages is None:
            return False
        seq.pages.extend(pages)
        track.capacity = len(seq.pages) * self._arena.page_size
        return True

    def grow_each(self, tracks: Collection[Track]) -> bool:
        """Give each of these running sequences a page for its newest token, all at once.

        False, with nothing changed, without room, or if one page is not what each of them lacks.
        """
        if any(len(track.seq.tokens) != track.capacity + 1 for track in tracks):
            return False
        pages = self._arena.allocate(len(tracks))
        if pages is None:
            return False
        page_size = self._arena.page_size
        for track, page in zip(tracks, pages, strict=True):
            track.seq.pages.append(page)
            track.capacity += page_size
        return True

    def vacate(self, track: Track, *, keep: bool, num_kept: int | None = None) -> None:
        """Take back all that a running sequence holds.

        keep: cache its KV until the room is needed. num_kept: only that of so many tokens; None for all.
        """
        seq = track.seq
        tree = self._arena.tree
        limit = len(seq.pages) if num_kept is None else self._arena.pages_for(num_kept)
        if keep and track.namespace is not None and limit * self._arena.page_size > seq.num_prompt:
            tree.insert(
                track.namespace, track.cache_keys, seq.num_computed, seq.pages, track.node,
                with_partial=True, is_leaving=True,
            )  # fmt: skip
        tree.release(seq.pages, dead=seq.pages[limit:])
        self._drop_adapter(track)
        seq.pages = []
        track.node = None
        track.capacity = 0

    def prefetch(self, wanted: Iterable[AdapterRef], limit: int, reserve: int, draft: PlanDraft) -> None:
        """Load up to `limit` adapters, needed soonest first, into pages that no running sequence holds.

        Never evicts an adapter that is needed sooner; stops at the first that finds no room.
        reserve: pages left to be had besides, or else growing sequences would soon push out again
        what was just loaded.
        """
        adapters = self._arena.adapters
        needed_sooner: set[str] = set()
        for ref in wanted:
            needed_sooner.add(ref.digest)
            if adapters.is_resident(ref.digest):
                continue
            num_left = self._arena.num_available_beside(needed_sooner) - ref.num_pages
            if limit == 0 or num_left < reserve:
                return
            self._load(ref, self._take(ref.num_pages, needed_sooner), draft)
            limit -= 1

    def _drop_adapter(self, track: Track) -> None:
        if track.adapter is not None:
            self._arena.adapters.release(track.adapter.ref.digest)
            track.adapter = None

    def _take(self, n: int, protected: Collection[str] = ()) -> list[int]:
        pages = self._arena.allocate(n, protected)
        assert pages is not None, "pages counted as available were not"
        return pages

    def _num_pinned(self, except_digest: str | None) -> int:
        pinned = self._arena.adapters.pinned
        return sum(ref.num_pages for digest, ref in pinned.items() if digest != except_digest)
