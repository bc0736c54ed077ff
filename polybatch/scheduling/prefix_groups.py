"""Which prompts of a large set belong together: the plan for offline work. Pure: prompts in, groups out.

    prompts -> sorted -> radix tree over their tokens -> first level enlarged -> groups -> decode-heavy first

Prompts are compared as bytes, four to a token, so that sorting and comparing run at the speed of memcmp; in
sorted order the tree is a sequence of common lengths of neighbours, and its nodes are never spelt out.

A group is a first-level prefix with everything below it. Where prefixes nest, forking an inner prefix g out
of c makes a group of its own for which c is computed once more: that pays iff (leaves(g) - 1) * |g| > |c|.
Here this only decides what is run as a unit, never what is computed twice: the engine's prefix tree shares
every level, and groups and the rows in them come in the order of the tree, depth first, so that a prefix is
used up before the next one begins. So what is computed lies between `multi_level_tokens` and
`one_level_tokens`, and is the former wherever the prefixes on one path fit in memory.

At every branching of the tree, what has much output for its input goes first, so that its decodes run beside
later prefills. Groups of one adapter stay together, so that it is loaded once.
Source: BatchLLM (Zheng et al. 2024), sections on prefix identification and group scheduling.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

TOKEN_BYTES = array("i").itemsize


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A prompt to be planned.

    key: its tokens, of `prompt_key`. expected_tokens: of output. namespace: prefixes are shared only within
    one; it covers the adapter. adapter: its digest, "" for none.
    """

    key: bytes
    expected_tokens: float = 0.0
    namespace: str = ""
    adapter: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Group:
    """Rows to be run together.

    rows: indices into what was planned, in the tree's order: neighbours share most. prefix_tokens: common to
    all, in whole pages. logical_tokens: of all prompts; physical_tokens: distinct ones, what is computed if
    the group runs alone. expected_tokens: of output.
    """

    rows: tuple[int, ...]
    prefix_tokens: int
    logical_tokens: int
    physical_tokens: int
    expected_tokens: float

    @property
    def ratio(self) -> float:
        """Output tokens per computed input token: those with the largest go first."""
        return self.expected_tokens / self.physical_tokens

    @property
    def one_level_tokens(self) -> int:
        """Tokens to compute where only the common prefix is shared."""
        return self.logical_tokens - (len(self.rows) - 1) * self.prefix_tokens


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Groups in the order in which they should run, and what sharing saves.

    logical_tokens: of all prompts. multi_level_tokens: what must be computed at least, every level of every
    prefix once; each prompt's last token is always computed. one_level_tokens: with one level of sharing.
    """

    groups: tuple[Group, ...]
    logical_tokens: int
    one_level_tokens: int
    multi_level_tokens: int

    @property
    def order(self) -> list[int]:
        """All rows, in the order in which they should run."""
        return [row for group in self.groups for row in group.rows]

    @property
    def saving(self) -> float:
        """Share of prompt tokens that need not be computed: 1 - physical / logical, at the optimum."""
        return 1 - self.multi_level_tokens / self.logical_tokens if self.logical_tokens else 0.0


def prompt_key(tokens: Iterable[int]) -> bytes:
    """Tokens as bytes that compare and sort fast. Raises OverflowError beyond 32 bits."""
    return array("i", tokens).tobytes()


def common_tokens(a: bytes, b: bytes) -> int:
    """Length of the common prefix of two keys, in tokens. O(log n) comparisons of memory."""
    low, high = 0, min(len(a), len(b)) // TOKEN_BYTES
    if a[: high * TOKEN_BYTES] == b[: high * TOKEN_BYTES]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        # What is known to be equal is not compared again.
        at, end = low * TOKEN_BYTES, middle * TOKEN_BYTES
        if a[at:end] == b[at:end]:
            low = middle
        else:
            high = middle
    return low


def plan_groups(rows: Sequence[PlanRow], page_size: int = 1) -> GroupPlan:
    """Plan rows, in any order; every row is in exactly one group.

    page_size: prefixes count in whole pages of so many tokens. O(n log n) comparisons of keys.
    """
    by_namespace: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_namespace.setdefault(row.namespace, []).append(index)
    units: dict[tuple[str, int], _Branch] = {}
    multi_level = 0
    for indices in by_namespace.values():
        indices.sort(key=lambda index: rows[index].key)
        found, physical = _group_sorted(rows, indices, page_size)
        multi_level += physical
        adapter = rows[indices[0]].adapter
        for branch in _branches(found, [rows[group.rows[0]].key for group in found], page_size):
            # All of an adapter's in one unit, the others' each by itself.
            unit = units.setdefault((adapter, 0 if adapter else len(units)), _Branch(0))
            unit.add(branch)
    top = _Branch(0)
    for unit in units.values():
        top.add(unit)
    groups = top.in_order()
    return GroupPlan(
        groups=tuple(groups),
        logical_tokens=sum(group.logical_tokens for group in groups),
        one_level_tokens=sum(group.one_level_tokens for group in groups),
        multi_level_tokens=multi_level,
    )


class _Branch:
    """Groups with a common prefix of `depth` tokens, and what they take together."""

    __slots__ = ("children", "depth", "expected_tokens", "group", "physical_tokens")

    def __init__(self, depth: int, group: Group | None = None) -> None:
        self.depth = depth
        self.group = group
        self.children: list[_Branch] = []
        self.expected_tokens = 0.0 if group is None else group.expected_tokens
        self.physical_tokens = 0 if group is None else group.physical_tokens

    def add(self, child: _Branch) -> None:
        self.children.append(child)
        self.expected_tokens += child.expected_tokens
        self.physical_tokens += child.physical_tokens

    @property
    def ratio(self) -> float:
        return self.expected_tokens / self.physical_tokens

    def in_order(self) -> list[Group]:
        """All groups, depth first, children with the largest ratio first."""
        groups, stack = [], [self]
        while stack:
            branch = stack.pop()
            if branch.group is not None:
                groups.append(branch.group)
            # The last is taken off first; equal ones keep their order.
            stack += sorted(branch.children, key=lambda child: -child.ratio)[::-1]
        return groups


def _branches(groups: list[Group], keys: list[bytes], page_size: int) -> list[_Branch]:
    """The tree over groups of one namespace, sorted by their first keys: what shares no page with others."""
    stack = [_Branch(0)]
    for at, group in enumerate(groups):
        common = common_tokens(keys[at - 1], keys[at]) // page_size * page_size if at else 0
        _fold(stack, common)
        stack.append(_Branch(len(keys[at]) + 1, group))
    _fold(stack, 0)
    return stack[0].children


def _fold(stack: list[_Branch], depth: int) -> None:
    """Hang branches deeper than `depth` below what they share with the next."""
    while stack[-1].depth > depth:
        branch = stack.pop()
        if stack[-1].depth < depth:
            stack.append(_Branch(depth))
        stack[-1].add(branch)


@dataclass(slots=True)
class _Node:
    """A prefix of `depth` tokens; `leaves` are positions of rows that hang here directly."""

    depth: int
    leaves: list[int] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)
    num_leaves: int = 0


def _group_sorted(rows: Sequence[PlanRow], indices: list[int], page_size: int) -> tuple[list[Group], int]:
    """Groups of sorted rows of one namespace, and the tokens that must be computed at least."""
    shared = [0] * (len(indices) + 1)
    """At i: tokens that row i shares with the one before it; 0 at both ends."""
    physical = 0
    for at, index in enumerate(indices):
        row = rows[index]
        if at:
            shared[at] = common_tokens(rows[indices[at - 1]].key, row.key)
        physical += row.num_tokens - min(shared[at], row.num_tokens - 1)
    root = _first_level([common // page_size * page_size for common in shared])
    groups = [_group(rows, [indices[at]], 0) for at in root.leaves]
    for node in root.children:
        groups.append(_group(rows, [indices[at] for at in sorted(_leaves(node))], node.depth))
    groups.sort(key=lambda group: rows[group.rows[0]].key)
    return groups, physical


def _first_level(shared: list[int]) -> _Node:
    """The tree over sorted rows, its first level enlarged; children of the result are the groups.

    shared: as long as the rows and one more; entry i is what rows i - 1 and i share.
    """
    stack = [_Node(0)]
    for at in range(len(shared) - 1):
        _close(stack, shared[at])
        depth = max(shared[at], shared[at + 1])
        if stack[-1].depth < depth:
            stack.append(_Node(depth))
        stack[-1].leaves.append(at)
        stack[-1].num_leaves += 1
    _close(stack, 0)
    return stack[0]


def _close(stack: list[_Node], depth: int) -> None:
    """Take nodes deeper than `depth` off the stack: they are complete, and so can be enlarged."""
    while stack[-1].depth > depth:
        node = stack.pop()
        if stack[-1].depth < depth:
            stack.append(_Node(depth))
        _enlarge(node, stack[-1])


def _enlarge(node: _Node, parent: _Node) -> None:
    """Hang a complete node below its parent, and beside it what is worth a prefix of its own."""
    kept = []
    cost = node.depth - parent.depth
    parent.num_leaves += node.num_leaves
    for child in node.children:
        if (child.num_leaves - 1) * (child.depth - node.depth) > cost:
            parent.children.append(child)
            node.num_leaves -= child.num_leaves
        else:
            kept.append(child)
    node.children = kept
    if node.num_leaves == 1:
        parent.leaves += _leaves(node)
    elif not node.leaves and len(kept) == 1:
        parent.children.append(kept[0])
    elif node.num_leaves:
        parent.children.append(node)


def _leaves(node: _Node) -> list[int]:
    """Positions of all rows below a node."""
    leaves, stack = [], [node]
    while stack:
        top = stack.pop()
        leaves += top.leaves
        stack += top.children
    return leaves


def _group(rows: Sequence[PlanRow], members: list[int], prefix_tokens: int) -> Group:
    logical = physical = 0
    before = b""
    for index in members:
        key, num_tokens = rows[index].key, rows[index].num_tokens
        logical += num_tokens
        physical += num_tokens - min(common_tokens(before, key), num_tokens - 1)
        before = key
    expected = sum(rows[index].expected_tokens for index in members)
    return Group(tuple(members), prefix_tokens, logical, physical, expected)
