"""A radix tree over KV pages: what has been computed once is found again by its tokens.

One node is one page; the edge to it is the tuple of the tokens it holds, so a lookup compares tokens
and never trusts a hash. Namespaces are separate trees: tokens under another adapter, tenant or KV
format have other KV. A page that is only partly filled hangs as a leaf; a new sequence cannot share
it, because its owner still writes there, but it can copy it and go on in its own page (copy-on-write).

Laws that make eviction simple:
- the tree holds exactly one reference to each of its pages;
- if a sequence holds a node's page, then it holds the pages of all ancestors, so the pages that
  nobody else holds are always whole subtrees and all of them can be evicted leaf by leaf.
Source: PagedAttention (Kwon et al. 2023) for pages, RadixAttention (Zheng et al. 2024) for the tree.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from polybatch.memory.pages import Clock, PagePool


class Node:
    """A cached page. `depth` counts pages from the root, this one included."""

    __slots__ = ("children", "depth", "heads", "is_queued", "key", "last_used", "page", "parent")

    def __init__(self, key: tuple[int, ...], page: int, parent: Node | None) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[tuple[int, ...], Node] = {}
        self.heads: dict[int, Node] = {}
        """First token -> the child last attached that begins with it: the candidate for a copy."""
        self.last_used = 0
        self.is_queued = False


class Root(Node):
    """The empty prefix of one namespace; it has no page."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: str) -> None:
        super().__init__((), -1, None)
        self.namespace = namespace


@dataclass(frozen=True, slots=True)
class MatchResult:
    """What of a token list is cached. Nothing is referenced yet: share the pages before allocating.

    pages: full pages from the first token on. node: the deepest of them, None where there is none.
    copy_page: a page whose first `copy_tokens` tokens continue the match; to be copied, never shared.
    """

    node: Node | None = None
    pages: tuple[int, ...] = ()
    copy_page: int | None = None
    copy_tokens: int = 0


class PrefixTree:
    """Cached pages by namespace and tokens, evicted leaf by leaf, least recently used first.

    `num_inserts` grows with every page that enters: while it stands still, a lookup finds no more.
    """

    def __init__(self, pool: PagePool, page_size: int, clock: Clock) -> None:
        self._pool = pool
        self._page_size = page_size
        self._clock = clock
        self._roots: dict[str, Root] = {}
        self._node_of: list[Node | None] = [None] * pool.num_pages
        self._evictable: list[tuple[int, int, Node]] = []
        self._order = itertools.count()
        self.num_nodes = 0
        self.num_inserts = 0
        self.num_query_tokens = 0
        self.num_hit_tokens = 0

    def match(self, namespace: str, tokens: SequenceOf[int]) -> MatchResult:
        """Find the longest cached prefix of `tokens`, leaving at least the last token to be computed."""
        root = self._roots.get(namespace)
        if root is None:
            return MatchResult()
        node: Node = root
        size = self._page_size
        limit = len(tokens) - 1
        now = self._clock.tick()
        pages = []
        position = 0
        while position + size <= limit:
            child = node.children.get(tuple(tokens[position : position + size]))
            if child is None:
                break
            child.last_used = now
            pages.append(child.page)
            node = child
            position += size
        common = 0
        head = node.heads.get(tokens[position]) if position < limit else None
        if head is not None:
            head.last_used = now
            for cached, token in zip(head.key, tokens[position:limit], strict=False):
                if cached != token:
                    break
                common += 1
        return MatchResult(
            node=node if pages else None,
            pages=tuple(pages),
            copy_page=head.page if head is not None else None,
            copy_tokens=common,
        )

    def insert(
        self,
        namespace: str,
        tokens: SequenceOf[int],
        num_tokens: int,
        pages: SequenceOf[int],
        node: Node | None = None,
        *,
        with_partial: bool = False,
        is_leaving: bool = False,
    ) -> Node | None:
        """Cache a sequence's pages for its first `num_tokens` tokens, all of which must have their KV.

        node: where an earlier insert or match of this sequence ended; the walk goes on from there.
        with_partial: also cache the last, partly filled page. is_leaving: the sequence is about to
        release all its pages, so pages that nobody shares may hang below equal pages of others.
        Returns the deepest node that is the sequence's own page; valid while it holds that page.
        Where another sequence cached the same tokens first, its page stays and this one is not cached.
        """
        size = self._page_size
        num_full = num_tokens // size
        if num_tokens == 0 or (node is not None and node.depth >= num_full and not with_partial):
            return node
        parent = node if node is not None else self._root(namespace)
        now = self._clock.tick()
        is_own = True
        for index in range(parent.depth, num_full):
            key = tuple(tokens[index * size : (index + 1) * size])
            child = parent.children.get(key)
            if child is None:
                child = self._attach(parent, key, pages[index], is_own)
                if child is None:
                    break
            elif child.page != pages[index]:
                if not is_leaving:
                    break
                is_own = False
            child.last_used = now
            parent = child
            if is_own:
                node = child
        else:
            if with_partial and num_tokens > num_full * size:
                key = tuple(tokens[num_full * size : num_tokens])
                self._attach_partial(parent, key, pages[num_full], is_own, now)
        self._drop_empty_root(namespace)
        return node

    def release(self, pages: Iterable[int], dead: Iterable[int] = ()) -> None:
        """Drop a sequence's references; what only the tree still holds becomes evictable.

        dead: those of them, parents first, that nobody is expected to look up again. Where nobody holds them
        either, they leave the tree at once, with all that hangs below them.
        """
        pool = self._pool
        now = self._clock.tick()
        pages = list(pages)
        pool.release_all(pages)
        refs, node_of = pool.refs, self._node_of
        for page in pages:
            node = node_of[page]
            if node is not None:
                node.last_used = now
                if not node.children and refs[page] == 1:
                    self._queue(node)
        for page in dead:
            node = self._node_of[page]
            if node is not None and pool.refs[page] == 1:
                self._forget(node)

    def oldest(self) -> int | None:
        """When the page that would be evicted next was last used; None if no page can be evicted."""
        heap = self._evictable
        while heap:
            time, _, node = heap[0]
            if node.parent is None or node.children or self._pool.refs[node.page] != 1:
                heapq.heappop(heap)
                node.is_queued = False
            elif node.last_used != time:
                heapq.heapreplace(heap, (node.last_used, next(self._order), node))
            else:
                return time
        return None

    def evict(self, n: int = 1) -> bool:
        """Free the `n` least recently used pages that only the tree holds; False if there are fewer."""
        heap, node = self._evictable, None
        for _ in range(n):
            if node is None:
                if self.oldest() is None:
                    return False
                node = heapq.heappop(heap)[2]
                node.is_queued = False
            node = self._detach(node)
            # What was released together goes one page after the other, without passing through the queue.
            if node is not None and heap and heap[0][0] < node.last_used:
                self._queue(node)
                node = None
        if node is not None:
            self._queue(node)
        return True

    def drop(self, namespace: str) -> None:
        """Forget a namespace; pages that sequences hold stay theirs."""
        root = self._roots.get(namespace)
        if root is None:
            return
        self._detach_below(root)

    def count_query(self, query_tokens: int, hit_tokens: int) -> None:
        """Count one admitted lookup, in tokens."""
        self.num_query_tokens += query_tokens
        self.num_hit_tokens += hit_tokens

    def pages(self) -> list[int]:
        """All pages of the tree, each once."""
        return [node.page for root in self._roots.values() for node in self._walk(root)]

    def check(self) -> None:
        """Assert the tree's laws. O(nodes); for tests."""
        refs = self._pool.refs
        queued = {id(entry[2]) for entry in self._evictable}
        nodes = [node for root in self._roots.values() for node in self._walk(root)]
        assert len(nodes) == self.num_nodes == sum(node is not None for node in self._node_of)
        assert all(root.children for root in self._roots.values()), "an empty namespace was kept"
        for node in nodes:
            parent = node.parent
            assert parent is not None
            assert parent.children[node.key] is node
            assert self._node_of[node.page] is node
            assert len(node.key) == self._page_size or not node.children, "a partial page has children"
            assert parent.parent is None or refs[node.page] == 1 or refs[parent.page] > 1, "idle ancestor"
            assert node.is_queued == (id(node) in queued)
            assert node.is_queued or node.children or refs[node.page] > 1, "an idle leaf is not evictable"
            assert all(parent.children.get(head.key) is head for head in parent.heads.values())

    def _root(self, namespace: str) -> Root:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Root(namespace)
        return root

    def _drop_empty_root(self, namespace: str) -> None:
        root = self._roots.get(namespace)
        if root is not None and not root.children:
            del self._roots[namespace]

    def _attach(self, parent: Node, key: tuple[int, ...], page: int, is_own: bool) -> Node | None:
        """Hang a page below `parent`; None where that would leave a shared page below idle ones."""
        node = self._node_of[page]
        if node is not None:
            # The page hangs there as a partly filled one, and its owner has filled it further.
            if node.parent is not parent:
                return None
            self._unlink(node)
            node.key = key
        else:
            if not is_own and self._pool.refs[page] != 1:
                return None
            node = Node(key, page, parent)
            self._pool.adopt(page)
            self._node_of[page] = node
            self.num_nodes += 1
        self.num_inserts += 1
        parent.children[key] = node
        parent.heads[key[0]] = node
        return node

    def _attach_partial(self, parent: Node, key: tuple[int, ...], page: int, is_own: bool, now: int) -> None:
        head = parent.heads.get(key[0])
        if (head is not None and head.key[: len(key)] == key) or key in parent.children:
            return
        node = self._attach(parent, key, page, is_own)
        if node is not None:
            node.last_used = now

    def _unlink(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        if parent.heads.get(node.key[0]) is node:
            del parent.heads[node.key[0]]

    def _detach(self, node: Node) -> Node | None:
        """Take out a leaf; returns its parent if that can be evicted now, and is to be queued."""
        parent = node.parent
        assert parent is not None
        self._unlink(node)
        node.parent = None
        self._node_of[node.page] = None
        self.num_nodes -= 1
        self._pool.disown(node.page)
        if parent.children:
            return None
        if isinstance(parent, Root):
            del self._roots[parent.namespace]
            return None
        return parent if self._pool.refs[parent.page] == 1 else None

    def _forget(self, node: Node) -> None:
        """Take out an idle node and what hangs below it, all of it idle."""
        self._detach_below(node)
        parent = self._detach(node)
        if parent is not None:
            self._queue(parent)

    def _detach_below(self, root: Node) -> None:
        for node in reversed(list(self._walk(root))):
            self._detach(node)
        if len(self._evictable) > 2 * self.num_nodes + 64:
            self._evictable = [entry for entry in self._evictable if entry[2].parent is not None]
            heapq.heapify(self._evictable)

    def _queue(self, node: Node) -> None:
        if not node.is_queued:
            node.is_queued = True
            heapq.heappush(self._evictable, (node.last_used, next(self._order), node))

    @staticmethod
    def _walk(root: Node) -> Iterator[Node]:
        """All nodes below one, parents before children."""
        stack = list(root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())
