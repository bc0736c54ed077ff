"""One pool for KV, cached prefixes and adapters: allocation that evicts what was idle for longest.

free + kv + adapter + cached = all pages, at every moment. KV pages are those that some sequence holds.
Evictable are cached pages and idle adapters; which goes first is decided by one logical clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from polybatch.config import PoolSpec
from polybatch.memory.adapter_cache import AdapterCache
from polybatch.memory.pages import Clock, PagePool
from polybatch.memory.prefix_tree import PrefixTree


class Arena:
    """The page pool with its two caches.

    reserve_pages: so many pages get memory only when running sequences or adapters need it. Prefixes that lie
    idle are evicted rather than kept at that price.
    """

    def __init__(self, spec: PoolSpec, reserve_pages: int = 0) -> None:
        self._reserve_pages = reserve_pages
        clock = Clock()
        self.page_size = spec.page_size
        self.pool = PagePool(spec.num_pages)
        self.tree = PrefixTree(self.pool, spec.page_size, clock)
        self.adapters = AdapterCache(self.pool, clock)

    @property
    def num_available(self) -> int:
        """Pages that can be had without taking anything from a running sequence."""
        return self.pool.num_free + self.pool.num_cached + self.adapters.num_evictable

    def num_available_beside(self, protected: Collection[str]) -> int:
        """The same, sparing idle adapters with these digests."""
        spared = self.adapters.num_evictable - self.adapters.num_evictable_without(protected)
        return self.num_available - spared

    @property
    def num_kv(self) -> int:
        """Pages whose KV running sequences hold."""
        pool = self.pool
        return pool.num_pages - pool.num_free - pool.num_cached - self.adapters.num_pages

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold the KV of so many tokens."""
        return -(-num_tokens // self.page_size)

    def allocate(self, n: int, protected: Collection[str] = ()) -> list[int] | None:
        """Take `n` pages, evicting the least recently used idle content as far as needed.

        protected: digests of idle adapters to spare. Returns None, with nothing evicted, where even
        evicting everything would not do.
        """
        if self.pool.num_free < n:
            if self.num_available_beside(protected) < n:
                return None
            if self.adapters.num_evictable == 0:
                self.tree.evict(n - self.pool.num_free)
            while self.pool.num_free < n:
                self._evict_oldest(protected)
        self._spare_reserve(n)
        return self.pool.allocate(n)

    def _spare_reserve(self, n: int) -> None:
        """Evict idle prefixes where `n` pages would otherwise cut into the reserve."""
        pool = self.pool
        while n - (pool.num_free - pool.num_fresh) > max(0, pool.num_fresh - self._reserve_pages):
            if not self.tree.evict():
                break

    def _evict_oldest(self, protected: Collection[str]) -> None:
        leaf = self.tree.oldest()
        idle = self.adapters.oldest(protected)
        if idle is not None and (leaf is None or idle.last_used < leaf):
            self.adapters.evict(idle.ref.digest)
        else:
            is_evicted = self.tree.evict()
            assert is_evicted, "pages counted as available cannot be evicted"

    def check(self, held: Iterable[list[int]]) -> None:
        """Assert exact accounting. held: the pages of every sequence. O(num_pages); for tests."""
        self.pool.check()
        self.tree.check()
        self.adapters.check()
        refs: Counter[int] = Counter()
        for pages in held:
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            refs.update(pages)
        num_kv = len(refs)
        refs.update(self.tree.pages())
        assert not refs.keys() & set(self.adapters.pages()), "a page holds both KV and an adapter"
        refs.update(self.adapters.pages())
        assert [refs[page] for page in range(self.pool.num_pages)] == self.pool.refs
        assert num_kv == self.num_kv
