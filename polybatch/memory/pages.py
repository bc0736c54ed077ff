"""Bookkeeping of the page pool: who holds which page, by reference counts. No memory is touched here.

A page is free, or it has references: one per sequence whose KV it holds, one if an adapter's rows are
in it, one if the prefix tree caches it. A page that only the prefix tree holds is *cached*: its content
is worth keeping, yet it may be taken at any time. `num_free` and `num_cached` are kept up to date, so
that asking how much room there is costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from polybatch.errors import EngineError


class Clock:
    """A logical clock that orders uses: prefix tree and adapter cache share one, so LRU spans both."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = 0

    def tick(self) -> int:
        self.now += 1
        return self.now


class PagePool:
    """Reference counts and a free list over pages 0 .. num_pages - 1. All operations are O(1) per page.

    `refs[page]` may be read by anyone and is written only here.
    `num_releases` counts every reference ever dropped: while it stands still, no room has appeared.
    `num_fresh` pages were never allocated, so the system may not have given memory for them; they go last.
    """

    __slots__ = ("_free", "_in_tree", "num_cached", "num_fresh", "num_pages", "num_releases", "refs")

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise EngineError(f"num_pages is {num_pages}; a pool needs at least one page")
        self.num_pages = num_pages
        self.refs = [0] * num_pages
        self.num_cached = 0
        self.num_fresh = num_pages
        self.num_releases = 0
        self._in_tree = bytearray(num_pages)
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, n: int) -> list[int] | None:
        """Take `n` free pages, each with one reference; None, and nothing taken, if fewer are free."""
        free = self._free
        if n > len(free):
            return None
        if n <= 0:
            return []
        pages = free[-n:]
        del free[-n:]
        # Freed pages come back on top, so that fresh ones are always at the bottom.
        self.num_fresh = min(self.num_fresh, len(free))
        for page in pages:
            self.refs[page] = 1
        return pages

    def share(self, page: int) -> None:
        """Add a reference to a page that has at least one."""
        refs = self.refs[page]
        if refs < 1:
            raise EngineError(f"page {page} is free and cannot be shared")
        if refs == 1 and self._in_tree[page]:
            self.num_cached -= 1
        self.refs[page] = refs + 1

    def release(self, page: int) -> None:
        """Drop a reference; the page is free when none is left, cached when only the tree's is left."""
        self.release_all((page,))

    def release_all(self, pages: Iterable[int]) -> None:
        """`release` each of these."""
        refs, in_tree, free = self.refs, self._in_tree, self._free
        for page in pages:
            left = refs[page] - 1
            is_in_tree = in_tree[page]
            if left < is_in_tree:
                raise EngineError(f"page {page} was released more often than it was taken")
            refs[page] = left
            self.num_releases += 1
            if left == 0:
                free.append(page)
            elif left == 1 and is_in_tree:
                self.num_cached += 1

    def adopt(self, page: int) -> None:
        """Add the prefix tree's reference to a page that a sequence holds."""
        if self._in_tree[page] or self.refs[page] < 1:
            raise EngineError(f"page {page} is free or already in the prefix tree")
        self._in_tree[page] = 1
        self.refs[page] += 1

    def disown(self, page: int) -> None:
        """Drop the prefix tree's reference; the page is free if it was the last."""
        if not self._in_tree[page]:
            raise EngineError(f"page {page} is not in the prefix tree")
        self._in_tree[page] = 0
        self.num_releases += 1
        self.refs[page] -= 1
        if self.refs[page] == 0:
            self.num_cached -= 1
            self._free.append(page)

    def is_cached(self, page: int) -> bool:
        """Whether only the prefix tree holds the page."""
        return self.refs[page] == 1 and self._in_tree[page] == 1

    @property
    def in_tree(self) -> bytes:
        """1 for each page that the prefix tree holds, 0 for the others."""
        return bytes(self._in_tree)

    def check(self) -> None:
        """Assert that the counters agree with the counts. O(num_pages); for tests."""
        assert self.num_fresh <= len(self._free), "a fresh page is not free"
        free = set(self._free)
        assert len(free) == len(self._free), "a page is twice in the free list"
        for page, refs in enumerate(self.refs):
            assert refs >= self._in_tree[page], f"page {page} has {refs} references"
            assert (refs == 0) == (page in free), f"page {page} has {refs} references"
        assert self.num_cached == sum(map(self.is_cached, range(self.num_pages)))
