"""The prefix tree: what it finds, what it refuses to share, what it evicts."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.memory.pages import Clock, PagePool
from polybatch.memory.prefix_tree import PrefixTree

SIZE = 4


def make(num_pages: int = 32) -> tuple[PagePool, PrefixTree]:
    pool = PagePool(num_pages)
    return pool, PrefixTree(pool, SIZE, Clock())


def cache(pool: PagePool, tree: PrefixTree, namespace: str, tokens: list[int]) -> list[int]:
    """Compute and leave: what a finished sequence does."""
    pages = pool.allocate(-(-len(tokens) // SIZE))
    assert pages is not None
    tree.insert(namespace, tokens, len(tokens), pages, with_partial=True, is_leaving=True)
    tree.release(pages)
    tree.check()
    pool.check()
    return pages


def test_full_pages_are_shared_and_the_partial_one_is_copied() -> None:
    pool, tree = make()
    tokens = list(range(10))
    pages = cache(pool, tree, "base", tokens)
    match = tree.match("base", [*tokens, 77])
    assert match.pages == tuple(pages[:2])
    assert (match.copy_page, match.copy_tokens) == (pages[2], 2)


def test_a_match_never_covers_the_last_token() -> None:
    pool, tree = make()
    tokens = list(range(8))
    pages = cache(pool, tree, "base", tokens)
    match = tree.match("base", tokens)
    assert match.pages == (pages[0],)
    assert (match.copy_page, match.copy_tokens) == (pages[1], 3)
    assert tree.match("base", tokens[:1]).copy_page is None


def test_namespaces_never_meet() -> None:
    pool, tree = make()
    cache(pool, tree, "tenant-a", list(range(9)))
    match = tree.match("tenant-b", list(range(9)))
    assert match.pages == ()
    assert match.copy_page is None


def test_tokens_with_equal_hashes_are_told_apart() -> None:
    # hash(-1) == hash(-2) in CPython, and so for tuples of them.
    pool, tree = make()
    assert hash((-1,) * SIZE) == hash((-2,) * SIZE)
    cache(pool, tree, "base", [-1] * SIZE + [5])
    assert tree.match("base", [-2] * SIZE + [5, 5]).pages == ()


def test_a_diverging_page_is_copied_up_to_the_difference() -> None:
    pool, tree = make()
    pages = cache(pool, tree, "base", [1, 2, 3, 4, 5, 6, 7, 8])
    match = tree.match("base", [1, 2, 3, 4, 5, 6, 9, 9, 9])
    assert match.pages == (pages[0],)
    assert (match.copy_page, match.copy_tokens) == (pages[1], 2)


def test_a_partial_page_grows_into_a_full_one_without_a_second_reference() -> None:
    pool, tree = make()
    pages = pool.allocate(2)
    assert pages is not None
    tokens = [1, 2, 3, 4, 5, 6]
    node = tree.insert("base", tokens, 6, pages, with_partial=True)
    tokens += [7, 8]
    tree.insert("base", tokens, 8, pages, node)
    tree.check()
    assert pool.refs[pages[1]] == 2
    assert tree.match("base", [*tokens, 9]).pages == tuple(pages)


def test_equal_pages_of_a_running_sequence_are_not_cached_twice() -> None:
    pool, tree = make()
    first = cache(pool, tree, "base", list(range(8)))
    pages = pool.allocate(3)
    assert pages is not None
    tokens = [*range(8), 50, 51, 52, 53]
    assert tree.insert("base", tokens, 12, pages) is None
    assert [pool.refs[page] for page in pages] == [1, 1, 1]
    tree.insert("base", tokens, 12, pages, is_leaving=True)
    tree.release(pages)
    tree.check()
    assert tree.match("base", [*tokens, 1]).pages == (*first, pages[2])
    assert pool.num_free == 32 - 3


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    pool, tree = make()
    old = cache(pool, tree, "base", [1] * 8)
    new = cache(pool, tree, "base", [2] * 8)
    tree.match("base", [1] * 9)
    freed = []
    while tree.evict():
        tree.check()
        freed.append(next(page for page in (*old, *new) if pool.refs[page] == 0 and page not in freed))
    assert freed == [new[1], new[0], old[1], old[0]]
    assert pool.num_free == 32


def test_eviction_never_frees_a_shared_page() -> None:
    pool, tree = make()
    pages = cache(pool, tree, "base", list(range(12)))
    held = tree.match("base", list(range(9))).pages
    for page in held:
        pool.share(page)
    while tree.evict():
        tree.check()
    assert [pool.refs[page] for page in pages] == [2, 2, 0]
    tree.release(held)
    while tree.evict():
        pass
    assert pool.num_free == 32


def test_a_leaf_that_is_shared_again_stays_in_the_tree() -> None:
    pool, tree = make()
    pages = cache(pool, tree, "base", list(range(8)))
    for page in pages:
        pool.share(page)
    assert tree.oldest() is None
    assert not tree.evict()
    assert tree.match("base", list(range(9))).pages == tuple(pages)


def test_a_shared_page_never_hangs_below_pages_that_nobody_holds() -> None:
    pool, tree = make()
    cache(pool, tree, "base", list(range(4)))
    pages = pool.allocate(2)
    assert pages is not None
    pool.share(pages[1])
    tree.insert("base", list(range(8)), 8, pages, is_leaving=True)
    tree.release(pages)
    tree.check()
    assert len(tree.match("base", list(range(9))).pages) == 1


def test_dropping_a_namespace_leaves_pages_to_those_who_hold_them() -> None:
    pool, tree = make()
    pages = cache(pool, tree, "fork", list(range(8)))
    cache(pool, tree, "base", list(range(8)))
    pool.share(pages[0])
    tree.drop("fork")
    tree.check()
    pool.check()
    assert (pool.refs[pages[0]], pool.refs[pages[1]]) == (1, 0)
    assert tree.match("fork", list(range(9))).pages == ()
    assert len(tree.match("base", list(range(9))).pages) == 2


def test_dropped_namespaces_leave_no_queue_behind() -> None:
    pool, tree = make()
    for index in range(1000):
        cache(pool, tree, f"fork/{index}", list(range(8)))
        tree.drop(f"fork/{index}")
    assert len(tree._evictable) <= 66
    assert not tree._roots


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.lists(st.integers(0, 1), min_size=1, max_size=14)), max_size=12
    ),
    st.lists(st.integers(0, 1), min_size=1, max_size=16),
    st.integers(0, 20),
)
def test_a_match_is_the_longest_of_full_pages_and_always_true(
    cached: list[tuple[str, list[int]]], query: list[int], num_evictions: int
) -> None:
    pool, tree = make(64)
    content: dict[int, tuple[str, tuple[int, ...]]] = {}
    for namespace, tokens in cached:
        pages = cache(pool, tree, namespace, tokens)
        for index, page in enumerate(pages):
            if pool.refs[page]:
                content[page] = (namespace, tuple(tokens[: (index + 1) * SIZE]))
    longest = 0
    for namespace, tokens in cached:
        common = 0
        while common < min(len(tokens), len(query) - 1) and tokens[common] == query[common]:
            common += 1
        if namespace == "a":
            longest = max(longest, common // SIZE)
    evicted = [tree.evict() for _ in range(num_evictions)]
    match = tree.match("a", query)
    if not any(evicted):
        assert len(match.pages) == longest
    for index, page in enumerate(match.pages):
        assert content[page] == ("a", tuple(query[: (index + 1) * SIZE]))
    if match.copy_page is not None:
        namespace, tokens_then = content[match.copy_page]
        num_matched = len(match.pages) * SIZE + match.copy_tokens
        assert 0 < match.copy_tokens <= SIZE
        assert num_matched < len(query)
        assert (namespace, tokens_then[:num_matched]) == ("a", tuple(query[:num_matched]))


def test_dead_pages_leave_at_once_with_all_that_hangs_below_them_unless_held() -> None:
    pool, tree = make()
    common = list(range(8))
    cache(pool, tree, "base", [*common, 50, 51, 52, 53])
    match = tree.match("base", [*common, 60])
    for page in match.pages:
        pool.share(page)
    other = tree.match("base", [*common[:4], 70])
    for page in other.pages:
        pool.share(page)
    tree.release(match.pages, dead=match.pages)
    # The first page is still held by the other; what hung below it is free.
    assert pool.num_free == pool.num_pages - 1
    assert tree.match("base", [*common, 60]).pages == other.pages
    tree.check()
    tree.release(other.pages, dead=other.pages)
    assert pool.num_free == pool.num_pages
    tree.check()
    pool.check()


def test_forgetting_pages_leaves_no_growing_list_behind() -> None:
    pool, tree = make()
    for number in range(2000):
        pages = pool.allocate(2)
        assert pages is not None
        tree.insert("base", [number] * 8, 8, pages)
        tree.release(pages, dead=pages)
    assert pool.num_free == pool.num_pages
    assert len(tree._evictable) < 200
