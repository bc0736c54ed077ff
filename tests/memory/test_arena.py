"""One pool for all: eviction across prefixes and adapters, exact accounting."""

from __future__ import annotations

from polybatch.config import PoolSpec
from polybatch.memory.arena import Arena
from polybatch.request import AdapterRef


def make(num_pages: int) -> Arena:
    return Arena(PoolSpec(num_pages=num_pages, page_size=2, page_bytes=8, num_layers=1))


def cache_tokens(arena: Arena, tokens: list[int]) -> None:
    pages = arena.allocate(arena.pages_for(len(tokens)))
    assert pages is not None
    arena.tree.insert("base", tokens, len(tokens), pages, with_partial=True, is_leaving=True)
    arena.tree.release(pages)


def cache_adapter(arena: Arena, name: str, num_pages: int) -> None:
    pages = arena.allocate(num_pages)
    assert pages is not None
    arena.adapters.install(AdapterRef(name, name, num_pages), pages)


def test_what_was_idle_for_longest_goes_first_be_it_prefix_or_adapter() -> None:
    arena = make(6)
    cache_tokens(arena, [1, 1])
    cache_adapter(arena, "a", 2)
    cache_tokens(arena, [2, 2])
    cache_adapter(arena, "b", 2)
    arena.check([])
    assert arena.pool.num_free == 0

    def remaining() -> tuple[bool, bool, bool, bool]:
        arena.check([])
        return (
            bool(arena.tree.match("base", [1, 1, 0]).pages),
            arena.adapters.is_resident("a"),
            bool(arena.tree.match("base", [2, 2, 0]).pages),
            arena.adapters.is_resident("b"),
        )

    seen = []
    for num_pages in (1, 2, 4, 6):
        pages = arena.allocate(num_pages)
        assert pages is not None
        arena.tree.release(pages)
        seen.append(remaining())
    # Looking refreshes a prefix, so [2, 2] outlives adapter b.
    assert seen == [
        (False, True, True, True),
        (False, False, True, True),
        (False, False, True, False),
        (False, False, False, False),
    ]


def test_a_hopeless_allocation_evicts_nothing() -> None:
    arena = make(4)
    held = arena.allocate(1)
    assert held is not None
    cache_tokens(arena, [1, 1])
    cache_adapter(arena, "a", 2)
    assert arena.allocate(4) is None
    assert arena.allocate(3, protected={"a"}) is None
    assert arena.adapters.is_resident("a")
    assert arena.pool.num_cached == 1
    arena.check([held])


def test_a_protected_adapter_is_spared_even_if_it_is_the_oldest() -> None:
    arena = make(4)
    cache_adapter(arena, "a", 2)
    cache_adapter(arena, "b", 2)
    assert arena.allocate(2, protected={"a"}) is not None
    assert arena.adapters.is_resident("a")
    assert not arena.adapters.is_resident("b")


def with_reserve(num_pages: int, reserve_pages: int) -> Arena:
    return Arena(PoolSpec(num_pages=num_pages, page_size=2, page_bytes=8, num_layers=1), reserve_pages)


def test_idle_prefixes_go_before_a_page_of_the_reserve_is_touched() -> None:
    arena = with_reserve(8, 4)
    for first in range(6):
        cache_tokens(arena, [first, 1, first, 2])
        arena.check([])
    assert arena.pool.num_fresh == 4
    assert arena.pool.num_cached == 4
    assert not arena.tree.match("base", [3, 1, 3, 2, 0]).pages
    assert arena.tree.match("base", [5, 1, 5, 2, 0]).pages


def test_running_sequences_get_the_whole_reserve() -> None:
    arena = with_reserve(8, 4)
    cache_tokens(arena, [1, 1, 1, 2])
    held = arena.allocate(8)
    assert held is not None
    assert arena.pool.num_fresh == 0
    arena.check([held])


def test_memory_that_was_taken_once_keeps_prefixes() -> None:
    arena = with_reserve(8, 4)
    held = arena.allocate(7)
    assert held is not None
    arena.tree.insert("base", list(range(14)), 14, held, with_partial=True, is_leaving=True)
    arena.tree.release(held)
    assert arena.pool.num_cached == 7
    cache_tokens(arena, [20, 21])
    assert arena.pool.num_fresh == 1
    assert arena.pool.num_cached == 7
    arena.check([])


def test_without_a_reserve_the_cache_fills_the_pool() -> None:
    arena = make(8)
    for first in range(6):
        cache_tokens(arena, [first, 1, first, 2])
    assert (arena.pool.num_fresh, arena.pool.num_cached) == (0, 8)
