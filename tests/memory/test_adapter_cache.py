"""Which adapters stay resident, and which must go."""

from __future__ import annotations

import pytest

from polybatch.errors import EngineError
from polybatch.memory.adapter_cache import AdapterCache
from polybatch.memory.pages import Clock, PagePool
from polybatch.request import AdapterRef


def make(num_pages: int = 16) -> tuple[PagePool, AdapterCache]:
    pool = PagePool(num_pages)
    return pool, AdapterCache(pool, Clock())


def install(pool: PagePool, cache: AdapterCache, name: str, num_pages: int = 2) -> AdapterRef:
    ref = AdapterRef(name, f"digest-{name}", num_pages)
    pages = pool.allocate(num_pages)
    assert pages is not None
    cache.install(ref, pages)
    cache.check()
    return ref


def test_an_adapter_in_use_cannot_be_evicted() -> None:
    pool, cache = make()
    ref = install(pool, cache, "sql")
    cache.acquire(ref.digest)
    cache.acquire(ref.digest)
    cache.release(ref.digest)
    assert cache.oldest() is None
    with pytest.raises(EngineError):
        cache.evict(ref.digest)
    cache.release(ref.digest)
    cache.evict(ref.digest)
    cache.check()
    assert pool.num_free == 16


def test_the_idle_adapter_used_longest_ago_goes_first() -> None:
    pool, cache = make()
    refs = [install(pool, cache, name) for name in ("a", "b", "c")]
    cache.acquire(refs[0].digest)
    cache.release(refs[0].digest)
    oldest = cache.oldest()
    assert oldest is not None
    assert oldest.ref.name == "b"
    spared = cache.oldest(protected={"digest-b"})
    assert spared is not None
    assert spared.ref.name == "c"
    assert cache.num_evictable_without({"digest-b", "unknown"}) == 4


def test_a_pinned_adapter_stays_until_it_is_unpinned() -> None:
    pool, cache = make()
    ref = install(pool, cache, "a")
    cache.pin(ref)
    cache.check()
    assert (cache.oldest(), cache.num_evictable) == (None, 0)
    cache.acquire(ref.digest)
    cache.release(ref.digest)
    cache.check()
    assert cache.oldest() is None
    cache.unpin(ref.digest)
    cache.unpin(ref.digest)
    cache.check()
    assert cache.num_evictable == 2


def test_two_names_of_the_same_weights_share_pages() -> None:
    pool, cache = make()
    install(pool, cache, "a")
    twin = AdapterRef("b", "digest-a", 2)
    assert cache.is_resident(twin.digest)
    with pytest.raises(EngineError, match="already resident"):
        cache.install(twin, [5, 6])


def test_an_adapter_without_pages_can_be_resident() -> None:
    pool, cache = make()
    ref = install(pool, cache, "bias-only", 0)
    assert cache.acquire(ref.digest).pages == ()
    cache.release(ref.digest)
    cache.evict(ref.digest)
    cache.check()


def test_releasing_more_often_than_acquiring_is_an_error() -> None:
    pool, cache = make()
    ref = install(pool, cache, "a")
    with pytest.raises(EngineError, match="released more often"):
        cache.release(ref.digest)
    cache.check()


def test_forgetting_a_load_frees_even_a_pinned_adapter() -> None:
    pool, cache = make()
    ref = install(pool, cache, "a")
    cache.pin(ref)
    cache.forget(ref.digest)
    cache.forget(ref.digest)
    cache.check()
    assert pool.num_free == 16
    assert ref.digest in cache.pinned
