"""The global plan: a permutation, decode-heavy first, never worse than one level of sharing."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.scheduling.prefix_groups import PlanRow, common_tokens, plan_groups, prompt_key

Prompt = tuple[int, ...]

prompts_of_few_tokens = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), max_size=30)


def rows_of(
    prompts: list[Prompt], expected: float = 1, namespace: str = "", adapter: str = ""
) -> list[PlanRow]:
    return [PlanRow(prompt_key(prompt), expected, namespace, adapter) for prompt in prompts]


def num_distinct(prompts: list[Prompt]) -> int:
    """Nodes of the tree over the prompts; each prompt's last token is computed for itself."""
    prefixes = {prompt[:end] for prompt in prompts for end in range(1, len(prompt))}
    ends = [prompt for prompt in prompts if prompt not in prefixes]
    inner = len(prompts) - len(ends)
    # A prompt that is another's prefix still computes its last token, but one of them can be the first.
    return len(prefixes) + len(ends) + inner - len({prompt for prompt in prompts if prompt in prefixes})


def naive_first_level(prompts: list[Prompt]) -> set[tuple[int, frozenset[int]]]:
    """The enlargement as it is told, over an explicit tree: (prefix length, rows) of every group."""

    class Node:
        def __init__(self, text: Prompt, leaves: list[int], children: list[Node]) -> None:
            self.text, self.leaves, self.children = text, leaves, children

        def rows(self) -> list[int]:
            return self.leaves + [row for child in self.children for row in child.rows()]

    def build(rows: list[int], depth: int) -> list[Node]:
        """Nodes below a prefix of `depth` tokens that all rows have."""
        nodes = []
        by_token: dict[int, list[int]] = {}
        for row in rows:
            if len(prompts[row]) == depth:
                nodes.append(Node((), [row], []))
            else:
                by_token.setdefault(prompts[row][depth], []).append(row)
        for members in by_token.values():
            end = depth + 1
            while len({prompts[row][: end + 1] for row in members}) == 1 and len(prompts[members[0]]) > end:
                end += 1
            if len(members) == 1:
                nodes.append(Node((), members, []))
            else:
                nodes.append(Node(prompts[members[0]][depth:end], [], build(members, end)))
        return nodes

    def enlarge(node: Node) -> list[Node]:
        """What takes the node's place among its siblings."""
        children = [new for child in node.children for new in enlarge(child)]
        forked, kept = [], []
        for child in children:
            is_inner = bool(child.children)
            if is_inner and (len(child.rows()) - 1) * len(child.text) - len(node.text) > 0:
                forked.append(Node(node.text + child.text, [], child.children))
            else:
                kept.append(child)
        node.children = kept
        if len(kept) == 1 and node.text:
            only = kept[0]
            forked.append(Node(node.text + only.text if only.children else (), only.leaves, only.children))
        elif kept or node.leaves:
            forked.append(node)
        return forked

    first = [new for node in build(list(range(len(prompts))), 0) for new in enlarge(node)]
    return {(len(node.text) if node.children else 0, frozenset(node.rows())) for node in first}


@settings(max_examples=150, deadline=None)
@given(prompts_of_few_tokens)
def test_the_enlarged_first_level_is_that_of_the_recursion_over_an_explicit_tree(
    prompts: list[Prompt],
) -> None:
    plan = plan_groups(rows_of(prompts))
    found = {(group.prefix_tokens, frozenset(group.rows)) for group in plan.groups}
    assert found == naive_first_level(prompts)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=14), st.floats(0, 100), st.sampled_from("xyz")
        ),
        max_size=40,
    ),
    st.sampled_from([1, 2, 4]),
)
def test_a_plan_is_a_permutation_whose_groups_share_their_prefix(
    drawn: list[tuple[list[int], float, str]], page_size: int
) -> None:
    rows = [PlanRow(prompt_key(tokens), expected, space) for tokens, expected, space in drawn]
    plan = plan_groups(rows, page_size)
    assert sorted(plan.order) == list(range(len(rows)))
    for group in plan.groups:
        first = rows[group.rows[0]]
        assert group.prefix_tokens % page_size == 0
        for index in group.rows:
            assert rows[index].namespace == first.namespace
            assert common_tokens(rows[index].key, first.key) >= group.prefix_tokens


@settings(max_examples=150, deadline=None)
@given(prompts_of_few_tokens)
def test_the_optimum_counts_every_token_of_the_tree_once(prompts: list[Prompt]) -> None:
    plan = plan_groups(rows_of(prompts))
    assert plan.multi_level_tokens == num_distinct(prompts)
    assert plan.logical_tokens == sum(map(len, prompts))
    assert plan.multi_level_tokens <= sum(g.physical_tokens for g in plan.groups)
    assert sum(g.physical_tokens for g in plan.groups) <= plan.one_level_tokens + len(prompts)


@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_tokens_is_the_length_of_the_common_prefix(a: list[int], b: list[int]) -> None:
    common = 0
    while common < min(len(a), len(b)) and a[common] == b[common]:
        common += 1
    assert common_tokens(prompt_key(a), prompt_key(b)) == common


def test_prefixes_that_save_more_than_they_cost_leave_a_common_one_and_others_stay() -> None:
    common = (1, 2, 3)
    large = [(*common, *range(10, 20), 100 + i) for i in range(5)]
    small = [(*common, 30, 100 + i) for i in range(3)]
    plan = plan_groups(rows_of(large + small + [(*common, 50), (*common, 51)]))
    groups = {frozenset(group.rows): group.prefix_tokens for group in plan.groups}
    assert groups == {frozenset(range(5)): 13, frozenset(range(5, 10)): 3}


def test_rows_of_a_group_come_in_the_order_of_the_tree() -> None:
    """So that a nested prefix is used up before the next is begun."""
    prompts = [(7,) * 20 + (inner,) * 3 + (row,) for row in range(4) for inner in range(3)]
    plan = plan_groups(rows_of(prompts))
    (group,) = plan.groups
    inner = [prompts[row][20] for row in group.rows]
    assert inner == [0] * 4 + [1] * 4 + [2] * 4


def test_groups_with_much_output_for_their_input_go_first() -> None:
    rows = rows_of([(1, 1, 1, i) for i in range(4)], expected=2) + rows_of(
        [(2, 2, 2, i) for i in range(4)], 50
    )
    rows += rows_of([(3,) * 50], 30)
    plan = plan_groups(rows)
    assert [rows[group.rows[0]].key[0] for group in plan.groups] == [2, 1, 3]


def test_groups_that_share_a_prefix_stay_together_and_in_them_the_decode_heavy_go_first() -> None:
    """Else the shared prefix is held, or lost and computed again, while others run."""
    rows = []
    for outer, expected in ((1, (5, 1, 9)), (2, (7, 8, 2))):
        for inner, tokens in enumerate(expected):
            rows += rows_of([(outer, outer, 50 + inner, 60, 70, i) for i in range(4)], tokens)
    random.Random(1).shuffle(rows)
    plan = plan_groups(rows)
    assert len(plan.groups) == 6
    assert [rows[group.rows[0]].expected_tokens for group in plan.groups] == [8, 7, 2, 9, 5, 1]


def test_an_adapter_has_its_groups_together_and_shares_with_no_other() -> None:
    rng = random.Random(3)
    rows = []
    for adapter in ("a", "b", "c"):
        for prefix in range(4):
            prompts = [(prefix, 5, 5, 5, rng.randrange(9)) for _ in range(3)]
            rows += rows_of(prompts, rng.randint(1, 100), f"model/{adapter}", adapter)
    rng.shuffle(rows)
    plan = plan_groups(rows)
    seen = [rows[index].adapter for index in plan.order]
    assert len([i for i in range(1, len(seen)) if seen[i] != seen[i - 1]]) == 2
    assert len(plan.groups) == 12


def test_on_two_level_trees_one_level_is_within_three_percent_of_the_optimum() -> None:
    rng = random.Random(42)
    prompts = []
    for _ in range(20):
        outer = [rng.randrange(9999) for _ in range(60)]
        for _ in range(8):
            inner = [rng.randrange(9999) for _ in range(400)]
            prompts += [(*outer, *inner, *(rng.randrange(9999) for _ in range(40))) for _ in range(16)]
    rng.shuffle(prompts)
    plan = plan_groups(rows_of(prompts))
    saved = 1 - plan.one_level_tokens / plan.logical_tokens
    assert saved >= 0.97 * plan.saving
    assert len(plan.groups) == 160


def test_prefixes_nested_beyond_the_recursion_limit_are_planned() -> None:
    prompts = [tuple([4] * length) for length in range(1, 3000)]
    plan = plan_groups(rows_of(prompts))
    assert sorted(plan.order) == list(range(len(prompts)))
    assert plan.multi_level_tokens == 2999
