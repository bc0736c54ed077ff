"""Reference counts of the page pool."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polybatch.errors import EngineError
from polybatch.memory.pages import PagePool


def test_allocation_is_all_or_nothing() -> None:
    pool = PagePool(4)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    pages = pool.allocate(4)
    assert pages is not None
    assert sorted(pages) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_a_shared_page_is_freed_by_its_last_holder() -> None:
    pool = PagePool(1)
    assert pool.allocate(1) == [0]
    pool.share(0)
    pool.release(0)
    assert pool.num_free == 0
    pool.release(0)
    assert pool.num_free == 1


def test_a_page_is_cached_only_while_nobody_but_the_tree_holds_it() -> None:
    pool = PagePool(1)
    pool.allocate(1)
    pool.adopt(0)
    assert pool.num_cached == 0
    pool.release(0)
    assert pool.is_cached(0)
    assert pool.num_cached == 1
    pool.share(0)
    assert pool.num_cached == 0
    pool.disown(0)
    assert (pool.num_cached, pool.num_free) == (0, 0)
    pool.release(0)
    assert pool.num_free == 1
    pool.check()


@pytest.mark.parametrize("operation", ["release", "share", "adopt", "disown"])
def test_an_illegal_transition_raises_and_changes_nothing(operation: str) -> None:
    pool = PagePool(2)
    with pytest.raises(EngineError, match="page 1"):
        getattr(pool, operation)(1)
    pool.check()
    assert pool.num_free == 2


def test_the_trees_reference_cannot_be_released_by_a_sequence() -> None:
    pool = PagePool(1)
    pool.allocate(1)
    pool.adopt(0)
    pool.release(0)
    with pytest.raises(EngineError, match="released more often"):
        pool.release(0)
    assert pool.is_cached(0)
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """The pool against plain counts."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6)
        self.holds: list[int] = []
        self.tree: set[int] = set()

    @rule(n=st.integers(0, 7))
    def allocate(self, n: int) -> None:
        in_use = set(self.holds) | self.tree
        pages = self.pool.allocate(n)
        assert (pages is None) == (n > 6 - len(in_use))
        if pages is not None:
            assert len(set(pages)) == n
            assert not in_use & set(pages)
            self.holds += pages

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.holds))
        self.holds.remove(page)
        self.pool.release(page)

    @precondition(lambda self: self.holds or self.tree)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted({*self.holds, *self.tree})))
        self.holds.append(page)
        self.pool.share(page)

    @precondition(lambda self: set(self.holds) - self.tree)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(set(self.holds) - self.tree)))
        self.tree.add(page)
        self.pool.adopt(page)

    @precondition(lambda self: self.tree)
    @rule(data=st.data())
    def disown(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.tree)))
        self.tree.remove(page)
        self.pool.disown(page)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check()
        assert self.pool.num_free == 6 - len({*self.holds, *self.tree})
        assert self.pool.num_cached == len(self.tree - set(self.holds))
        assert sum(self.pool.refs) == len(self.holds) + len(self.tree)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
