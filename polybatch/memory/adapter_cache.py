"""Which adapters are resident, in which pages, and who uses them. Bookkeeping only.

An adapter is *in use* while running sequences hold it, *idle* when none does, *pinned* when it must
never be evicted. Idle, unpinned adapters are evicted least recently used first. Everything is keyed
by content digest: two names of the same weights share pages, and new weights under an old name
are another adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable

from polybatch.errors import EngineError
from polybatch.memory.pages import Clock, PagePool
from polybatch.request import AdapterRef


class ResidentAdapter:
    """An adapter in the pool. `num_users` counts the running sequences that hold it."""

    __slots__ = ("last_used", "num_users", "pages", "ref")

    def __init__(self, ref: AdapterRef, pages: tuple[int, ...]) -> None:
        self.ref = ref
        self.pages = pages
        self.num_users = 0
        self.last_used = 0


class AdapterCache:
    """Adapters in pages. `num_pages` counts all their pages, `num_evictable` those of idle unpinned ones."""

    def __init__(self, pool: PagePool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._resident: dict[str, ResidentAdapter] = {}
        self._idle: OrderedDict[str, ResidentAdapter] = OrderedDict()
        self._pinned: dict[str, AdapterRef] = {}
        self.num_pages = 0
        self.num_evictable = 0
        self.num_loads = 0

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    @property
    def pinned(self) -> dict[str, AdapterRef]:
        """Digest -> adapter, resident or not."""
        return self._pinned

    def is_resident(self, digest: str) -> bool:
        return digest in self._resident

    def get(self, digest: str) -> ResidentAdapter | None:
        return self._resident.get(digest)

    def install(self, ref: AdapterRef, pages: list[int]) -> ResidentAdapter:
        """Take over freshly allocated pages for an adapter that is not resident; it starts idle.

        Whoever calls this emits the load: the pages hold the adapter once it is carried out.
        """
        if ref.digest in self._resident:
            raise EngineError(f"adapter {ref.name!r} is already resident")
        if len(pages) != ref.num_pages:
            raise EngineError(f"adapter {ref.name!r} takes {ref.num_pages} pages and was given {len(pages)}")
        entry = ResidentAdapter(ref, tuple(pages))
        self._resident[ref.digest] = entry
        self.num_pages += len(pages)
        self.num_loads += 1
        self._make_idle(entry)
        return entry

    def acquire(self, digest: str) -> ResidentAdapter:
        """Hold a resident adapter for one running sequence."""
        entry = self._resident[digest]
        if entry.num_users == 0 and self._idle.pop(digest, None) is not None:
            self.num_evictable -= len(entry.pages)
        entry.num_users += 1
        return entry

    def release(self, digest: str) -> None:
        """Drop one running sequence's hold; the pages stay until they are needed."""
        entry = self._resident[digest]
        if entry.num_users < 1:
            raise EngineError(f"adapter {entry.ref.name!r} was released more often than it was acquired")
        entry.num_users -= 1
        if entry.num_users == 0:
            self._make_idle(entry)

    def pin(self, ref: AdapterRef) -> None:
        """Never evict this adapter. It becomes resident when first used or prefetched."""
        self._pinned[ref.digest] = ref
        entry = self._idle.pop(ref.digest, None)
        if entry is not None:
            self.num_evictable -= len(entry.pages)

    def unpin(self, digest: str) -> None:
        """Let it be evicted again. Unpinning what is not pinned changes nothing."""
        if self._pinned.pop(digest, None) is None:
            return
        entry = self._resident.get(digest)
        if entry is not None and entry.num_users == 0:
            self._make_idle(entry)

    def oldest(self, protected: Collection[str] = ()) -> ResidentAdapter | None:
        """The idle adapter that would be evicted next, passing over `protected` digests."""
        for digest, entry in self._idle.items():
            if digest not in protected:
                return entry
        return None

    def num_evictable_without(self, protected: Collection[str]) -> int:
        """Pages that could be had by evicting every idle adapter except the protected ones."""
        kept = sum(len(self._idle[digest].pages) for digest in protected if digest in self._idle)
        return self.num_evictable - kept

    def evict(self, digest: str) -> None:
        """Free the pages of an idle, unpinned adapter."""
        entry = self._idle.pop(digest, None)
        if entry is None:
            raise EngineError("an adapter that is in use, pinned or not resident cannot be evicted")
        del self._resident[digest]
        self.num_pages -= len(entry.pages)
        self.num_evictable -= len(entry.pages)
        for page in entry.pages:
            self._pool.release(page)

    def forget(self, digest: str) -> None:
        """Free an unused adapter whose load was not carried out, even a pinned one (it stays pinned)."""
        entry = self._resident.get(digest)
        if entry is None:
            return
        if entry.num_users:
            raise EngineError(f"adapter {entry.ref.name!r} is in use by {entry.num_users} sequences")
        if digest not in self._idle:
            self._idle[digest] = entry
            self.num_evictable += len(entry.pages)
        self.evict(digest)

    def resident(self) -> Iterable[ResidentAdapter]:
        """Adapters in the pool, to be looked at only."""
        return self._resident.values()

    def pages(self) -> list[int]:
        """All pages of resident adapters, each once."""
        return [page for entry in self._resident.values() for page in entry.pages]

    def check(self) -> None:
        """Assert that the counters agree with the entries. O(adapters); for tests."""
        assert self.num_pages == len(self.pages()) == len(set(self.pages()))
        assert self.num_evictable == sum(len(entry.pages) for entry in self._idle.values())
        for digest, entry in self._resident.items():
            is_idle = entry.num_users == 0 and digest not in self._pinned
            assert (digest in self._idle) == is_idle, f"{entry.ref.name!r} has {entry.num_users} users"
            assert all(self._pool.refs[page] == 1 for page in entry.pages), "an adapter's page is shared"
        uses = [entry.last_used for entry in self._idle.values()]
        assert uses == sorted(uses), "idle adapters are out of order"

    def _make_idle(self, entry: ResidentAdapter) -> None:
        entry.last_used = self._clock.tick()
        digest = entry.ref.digest
        if digest not in self._pinned:
            self._idle[digest] = entry
            self.num_evictable += len(entry.pages)
