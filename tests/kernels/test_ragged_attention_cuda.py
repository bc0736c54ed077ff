"""The planned Triton kernel against the reference: ragged chunks, shared prefixes, cuts, poisoned memory.

Runs on the GPU where there is one, in Triton's interpreter elsewhere.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import EngineError
from polybatch.kernels.gluon import runs_hopper_kernels
from polybatch.kernels.ragged_attention import cuda, merge_states, ragged_attention
from polybatch.kernels.ragged_attention.work import (
    Heads,
    PrefixGroup,
    SharedTiles,
    Tile,
    Tiles,
    arrays,
    fill,
    find_prefix_groups,
    make_limits,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies bfloat16 matrices as if they held integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
PAGE = 16
SMALL = Tiles(narrow=Tile(16, 16, num_stages=1), wide=Tile(32, 32, num_stages=1))
LARGE = Heads(16, 1, 128)
SHARED = replace(SMALL, shared=SharedTiles(Tile(16, 32, num_stages=1), Tile(32, 16, num_stages=1)))


@dataclass
class Case:
    """chunks: (context, new) of each sequence; groups: (prefix in pages, members)."""

    chunks: list
    groups: list = field(default_factory=list)
    heads: Heads = field(default_factory=lambda: Heads(4, 2, 16))
    dtype: torch.dtype = torch.float32
    window: int | None = None
    tiles: Tiles = SMALL
    num_sms: int = 4
    ranges: list | None = None
    is_decode: bool = False
    padding: int = 3
    seed: int = 0


def pool_of(case):
    """Pages of NaN but for what the sequences hold, with bytes to spare after each, and the page table."""
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.heads
    kv_lens = [context + new for context, new in case.chunks]
    counts = [-(-n // PAGE) for n in kv_lens]
    num_pages = sum(counts) + 2
    size = 2 * heads.num_kv_heads * PAGE * heads.head_dim
    arena = torch.full((num_pages, size + 32), torch.nan, dtype=case.dtype)
    pages = arena[:, :size].view(num_pages, 2, heads.num_kv_heads, PAGE, heads.head_dim)
    order = torch.randperm(num_pages, generator=generator).tolist()
    table = torch.full((len(case.chunks), max(counts) + 1), 10**6, dtype=torch.int32)
    leaders = {}
    for prefix, members in case.groups:
        leaders.update(dict.fromkeys(members[1:], (members[0], prefix)))
    for s, kv_len in enumerate(kv_lens):
        leader, shared = leaders.get(s, (s, 0))
        table[s, :shared] = table[leader, :shared]
        for j in range(shared, counts[s]):
            table[s, j] = order.pop()
            held = min(PAGE, kv_len - j * PAGE)
            values = torch.randn(2, heads.num_kv_heads, held, heads.head_dim, generator=generator)
            pages[table[s, j], :, :, :held] = values.to(case.dtype)
    return arena, pages, table, generator


def plan(case, limits=None):
    counts = np.array([new for _, new in case.chunks])
    kv_lens = np.array([context + new for context, new in case.chunks])
    firsts = np.cumsum(counts) - counts
    limits = limits or make_limits(
        case.heads,
        case.tiles,
        max_tokens=int(counts.sum()) + case.padding,
        max_seqs=len(counts),
        num_sms=case.num_sms,
    )
    views = {name: np.full(shape, -7, dtype) for name, (shape, dtype) in arrays(limits).items()}
    views["attention_parts"][:] = 7  # as an earlier step may have left it
    groups = [PrefixGroup(m[0], prefix * PAGE, np.array(m)) for prefix, m in case.groups]
    work = fill(
        views, case.heads, case.tiles,
        first_tokens=firsts, num_new=counts, kv_lens=kv_lens, num_sms=case.num_sms,
        max_partials=limits.max_partials, groups=groups, window=case.window,
        context_range=None if case.ranges is None else np.array(case.ranges),
    )  # fmt: skip
    return views, limits, work


def run_both(case):
    """Ours (out, lse), then the reference's in float64, and the plan's summary."""
    arena, pages, table, generator = pool_of(case)
    heads = case.heads
    counts = torch.tensor([new for _, new in case.chunks])
    kv_lens = torch.tensor([context + new for context, new in case.chunks], dtype=torch.int32)
    num_tokens = int(counts.sum())
    q_size = heads.num_heads * heads.head_dim
    # Queries are columns of a wider row; padded rows and the rest of each row are NaN.
    qkv = torch.full((num_tokens + case.padding, q_size + 16), torch.nan, dtype=case.dtype)
    qkv[:num_tokens, :q_size] = torch.randn(num_tokens, q_size, generator=generator).to(case.dtype)
    q = qkv[:, :q_size].unflatten(1, (heads.num_heads, heads.head_dim))
    positions = torch.full((num_tokens + case.padding,), -1, dtype=torch.int32)
    positions[:num_tokens] = torch.cat([torch.arange(c, c + n) for c, n in case.chunks])
    views, limits, work = plan(case)
    scratch = cuda.make_scratch(heads, limits, DEVICE)
    scratch.out.fill_(torch.nan)
    scratch.lse.fill_(torch.nan)
    wider = torch.full((num_tokens + case.padding, q_size + 8), torch.nan, dtype=case.dtype, device=DEVICE)
    out = wider[:, :q_size]
    lse = torch.full((num_tokens + case.padding, heads.num_heads), torch.nan, device=DEVICE)
    on_device = {name: torch.from_numpy(view).to(DEVICE) for name, view in views.items()}
    arena = arena.to(DEVICE)
    for _ in range(
        2 if work.num_partials else 1
    ):  # the second launch finds the counters as the first left them
        out.fill_(torch.nan)
        cuda.ragged_attention(
            qkv.to(DEVICE)[:, :q_size].unflatten(1, (heads.num_heads, heads.head_dim)),
            out, arena, table.to(DEVICE), positions.to(DEVICE), on_device, scratch, heads, case.tiles,
            scale=heads.head_dim**-0.5, page_size=PAGE, window=case.window, lse=lse,
            max_narrow=work.num_narrow + 1 if 0 < work.num_narrow < limits.max_narrow else work.num_narrow,
            max_wide=work.num_wide, is_decode=case.is_decode, num_sms=case.num_sms,
        )  # fmt: skip
    assert not bool(scratch.counters.any())
    assert bool(wider[:, q_size:].isnan().all())
    cu_tokens = torch.tensor([0, *counts.tolist()]).cumsum(0).int()
    expected = ragged_attention(
        q[:num_tokens], pages, table, cu_tokens, kv_lens,
        scale=heads.head_dim**-0.5, window=case.window, accumulate=torch.float64,
        context_range=None if case.ranges is None else torch.tensor(case.ranges, dtype=torch.int32),
    )  # fmt: skip
    return (out.cpu(), lse.cpu()), expected, work


def check(case):
    (out, lse), (expected, expected_lse), work = run_both(case)
    num_tokens = len(expected)
    assert bool(out[num_tokens:].isnan().all())
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[case.dtype]
    ours = out[:num_tokens].double().view(expected.shape)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        lse[:num_tokens].double(), expected_lse, rtol=1e-4, atol=1e-4 if case.dtype == torch.float32 else 2e-2
    )
    return work, (ours, lse[:num_tokens], expected)


chunk_lists = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), min_size=1, max_size=3)
sms = st.sampled_from([1, 3, 16])


@settings(max_examples=5, deadline=None)
@given(
    chunks=chunk_lists,
    window=st.one_of(st.none(), st.integers(1, 70)),
    num_sms=sms,
    waves=st.sampled_from([1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_ragged_chunks_equal_the_reference_however_they_are_cut(chunks, window, num_sms, waves, seed):
    check(Case(chunks, window=window, num_sms=num_sms, tiles=replace(SMALL, waves=waves), seed=seed))


@settings(max_examples=5, deadline=None)
@given(
    shared=st.integers(1, 9),
    members=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), min_size=2, max_size=4),
    others=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), max_size=2),
    window=st.one_of(st.none(), st.integers(1, 200)),
    num_sms=sms,
    seed=st.integers(0, 99),
)
def test_a_prefix_read_once_equals_one_that_each_reads(shared, members, others, window, num_sms, seed):
    chunks = [(shared * PAGE + context, new) for context, new in members] + others
    case = Case(chunks, [(shared, list(range(len(members))))], window=window, num_sms=num_sms, seed=seed)
    check(case)


@settings(max_examples=3, deadline=None)
@given(
    shared=st.integers(1, 6),
    members=st.lists(st.integers(0, 20), min_size=9, max_size=10),
    others=st.lists(st.tuples(st.integers(0, 40), st.just(1)), max_size=1),
    window=st.one_of(st.none(), st.integers(1, 120)),
    num_sms=st.sampled_from([1, 6]),
    seed=st.integers(0, 99),
)
def test_parts_merged_apart_equal_the_reference(shared, members, others, window, num_sms, seed):
    chunks = [(shared * PAGE + context, 1) for context in members] + others
    groups = [(shared, list(range(len(members))))]
    case = Case(chunks, groups, window=window, num_sms=num_sms, seed=seed, tiles=SHARED, is_decode=True)
    assert check(case)[0].num_wide > 0


@settings(max_examples=2, deadline=None)
@given(
    shared=st.integers(1, 6),
    members=st.lists(st.integers(0, 70), min_size=9, max_size=10),
    others=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 8)), max_size=2),
    is_decode=st.booleans(),
    seed=st.integers(0, 99),
)
def test_two_pages_a_turn_by_one_warp_equal_the_reference(shared, members, others, is_decode, seed):
    narrow = Tile(16, 2 * PAGE, num_warps=1, num_stages=1)
    tiles = replace(SMALL, narrow=narrow, shared=SharedTiles(narrow, SMALL.wide))
    chunks = [(shared * PAGE + context, 1) for context in members] + others
    check(Case(chunks, [(shared, list(range(len(members))))], tiles=tiles, is_decode=is_decode, seed=seed))


def test_one_warp_begins_in_the_middle_of_a_page():
    tiles = replace(SMALL, narrow=Tile(16, 2 * PAGE, num_warps=1, num_stages=1))
    check(Case([(90, 1), (40, 3), (20, 1)], ranges=[[21, 91], [17, 30], [7, 7]], tiles=tiles))


@pytest.mark.skipif(not runs_hopper_kernels(), reason="needs a Hopper GPU and the Triton it was written for")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "keys", "num_sms"), [(Heads(32, 8, 128), 64, 132), (Heads(6, 2, 64), 64, 3), (LARGE, 128, 5)]
)
def test_the_pipelined_kernel_equals_the_reference(heads, dtype, keys, num_sms):
    members = 2 * 128 // heads.group + 3  # two wide items and some of a third
    pipelined = Tile(128, keys, num_stages=3)
    tiles = Tiles(shared=SharedTiles(Tile(16, 32, num_warps=1, num_stages=2), Tile(128, 32), pipelined))
    chunks = [(21 * PAGE + i % 50, 1) for i in range(members)] + [(30, 1), (5, 1)]
    long = (70, 128 // heads.group)  # whose own positions mask wide items
    case = Case(
        [*chunks, long], [(21, list(range(members)))], heads=heads, dtype=dtype, tiles=tiles, num_sms=num_sms,
        is_decode=True, seed=keys,
    )  # fmt: skip
    assert check(case)[0].num_wide > 3


@pytest.mark.parametrize(("prefix", "programs"), [(128, 64), (512, 128)])
def test_wide_programs_fill_half_of_the_multiprocessors_unless_prefixes_are_long(prefix, programs):
    heads, members = Heads(32, 8, 128), list(range(256))
    tiles = Tiles(shared=SharedTiles(Tile(16, 32), Tile(128, 32), pipelined=Tile(128, 64)))
    chunks = [(prefix * PAGE + 95, 1)] * 256
    case = Case(chunks, [(prefix, members)], heads=heads, tiles=tiles, num_sms=132)
    assert plan(case)[2].num_wide * heads.num_kv_heads == programs
    beside = replace(case, tiles=replace(tiles, shared=SharedTiles(Tile(16, 32), Tile(128, 32))))
    assert plan(beside)[2].num_wide * heads.num_kv_heads == 128


@settings(max_examples=3, deadline=None)
@given(chunks=chunk_lists, lows=st.lists(st.integers(0, 60), min_size=3, max_size=3), seed=st.integers(0, 99))
def test_a_range_of_the_context_merges_with_the_rest(chunks, lows, seed):
    cuts = [min(low, context + new) for low, (context, new) in zip(lows, chunks, strict=False)]
    totals = [context + new for context, new in chunks]
    case = Case(chunks, seed=seed)
    head = replace(case, ranges=[[0, cut] for cut in cuts])
    tail = replace(case, ranges=[[cut, total] for cut, total in zip(cuts, totals, strict=True)])
    first, second = check(head)[1], check(tail)[1]
    out, lse = merge_states([first[0], second[0]], [first[1], second[1]])
    (whole, whole_lse), _, _ = run_both(case)
    torch.testing.assert_close(out, whole[: len(out)].double().view(out.shape), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, whole_lse[: len(lse)], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads",
    [
        Heads(1, 1, 64),
        Heads(6, 2, 80),
        Heads(14, 2, 96),
        Heads(16, 1, 128),
        Heads(5, 5, 24),
        Heads(4, 1, 256),
    ],
)
def test_every_head_shape_and_dtype_equals_the_reference(heads, dtype):
    check(Case([(33, 1), (70, 1), (5, 4)], heads=heads, dtype=dtype))
    check(Case([(64, 1), (70, 1), (48, 2)], [(2, [0, 1, 2])], heads=heads, dtype=dtype, tiles=Tiles()))


@pytest.mark.parametrize("heads", [Heads(8, 2, 64), Heads(4, 1, 256)])
def test_parts_of_every_head_shape_are_merged_apart(heads):
    members = 16 // heads.group + 1
    tiles = Tiles(shared=SharedTiles(Tile(16, 32), Tile(128, 32, num_warps=8)))
    case = Case([(32 + i, 1) for i in range(members)], [(2, list(range(members)))], heads=heads, tiles=tiles)
    assert check(replace(case, dtype=torch.float16, is_decode=True))[0].num_wide == 1


def test_a_long_context_is_cut_and_merged_in_a_fixed_order():
    case = Case([(400, 1), (20, 1)], heads=Heads(2, 1, 16), num_sms=6)
    assert check(case)[0].num_partials > 4
    (out, lse), (again, lse_again) = run_both(case)[0], run_both(case)[0]
    assert torch.equal(out[:2], again[:2])
    assert torch.equal(lse[:2], lse_again[:2])


def test_a_group_reads_its_prefix_in_one_item_for_a_tile_of_members():
    chunks = [(128 + 5 * i, 1) for i in range(8)]
    views, _, work = plan(Case(chunks, [(8, list(range(8)))], num_sms=1))
    items = views["attention_narrow_items"][: work.num_narrow]
    assert work.num_wide == 0
    prefix = items[items[:, 4] == 128]
    assert prefix[:, 1].tolist() == [8]
    assert prefix[:, 3].tolist() == [0]
    assert sorted(items[items[:, 4] > 128, 3].tolist()) == [128] * 8


def test_items_stand_with_the_longest_first_and_cover_each_key_once():
    case = Case([(0, 40), (900, 1), (33, 5), (300, 1)], num_sms=16)
    views, _, work = plan(case)
    kinds = [
        views["attention_narrow_items"][: work.num_narrow].astype(int),
        views["attention_wide_items"][: work.num_wide].astype(int),
    ]
    assert all((np.diff(items[:, 4] - items[:, 3]) <= 0).all() for items in kinds)
    items = np.concatenate(kinds)
    for s, (context, new) in enumerate(case.chunks):
        last = items[items[:, 2] == s]
        last = last[last[:, 0] + last[:, 1] == last[:, 0].max() + last[last[:, 0].argmax(), 1]]
        covered = np.concatenate([np.arange(b, e) for b, e in last[:, 3:5]])
        assert sorted(covered.tolist()) == list(range(context + new))


@settings(max_examples=200, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 300)), min_size=1, max_size=30),
    num_sms=st.integers(1, 140),
    waves=st.sampled_from([1.0, 2.5]),
    num_kv_heads=st.integers(1, 8),
    group=st.integers(1, 16),
    shared=st.integers(0, 9),
)
def test_the_limits_hold_any_plan(chunks, num_sms, waves, num_kv_heads, group, shared):
    heads = Heads(num_kv_heads * group, num_kv_heads, 64)
    chunks = [(shared * PAGE + context, new) for context, new in chunks]
    groups = [(shared, list(range(len(chunks))))] if shared and len(chunks) > 1 else []
    case = Case(chunks, groups, heads=heads, num_sms=num_sms, tiles=Tiles(waves=waves))
    views, limits, work = plan(case)
    assert work.num_narrow <= limits.max_narrow
    assert work.num_wide <= limits.max_wide
    total = views["attention_parts"][: sum(new for _, new in chunks), 1]
    assert work.num_partials == int(total[total > 1].sum())


def test_limits_tell_steps_of_single_tokens():
    sizes = {"heads": Heads(4, 2, 16), "tiles": SMALL, "max_seqs": 8, "num_sms": 4}
    assert make_limits(**sizes, max_tokens=8).is_decode
    assert not make_limits(**sizes, max_tokens=9).is_decode


def test_shared_tiles_have_the_rows_that_plans_are_cut_for():
    for heads in (Heads(32, 8, 128), Heads(9, 3, 64), Heads(8, 8, 96), Heads(8, 4, 256)):
        for dtype in (torch.float32, torch.bfloat16):
            tiles = cuda.choose_tiles(heads, dtype)
            pair = tiles.shared or tiles
            assert (pair.narrow.rows, pair.wide.rows) == (tiles.narrow.rows, tiles.wide.rows)


@pytest.mark.parametrize("name", ["max_tokens", "max_narrow", "max_partials"])
def test_a_plan_beyond_a_limit_names_it(name):
    case = Case([(64, 1), (90, 1), (200, 1)], [(2, [0, 1])])
    _, limits, _ = plan(case)
    with pytest.raises(EngineError, match=f"{name} = .* room for 1"):
        plan(case, replace(limits, **{name: 1}))


def test_members_beyond_the_room_for_groups_read_the_prefix_themselves():
    case = Case([(64, 6), (90, 1), (200, 2), (80, 3)], [(2, [0, 1, 2, 3])])
    _, limits, _ = plan(case)
    views, _, work = plan(case, replace(limits, max_group_tokens=5))
    items = views["attention_narrow_items"][: work.num_narrow]
    assert views["attention_tokens"][:3].tolist() == [6, 7, 8]
    assert sorted(items[items[:, 3] == 0, 1].tolist()) == [3, 3, 6]


def test_a_prefix_beyond_what_a_member_had_is_refused():
    with pytest.raises(EngineError, match="longer than what a member had"):
        plan(Case([(64, 1), (31, 4)], [(2, [0, 1])]))


def groups_of(table, full, **options):
    options = {"page_size": PAGE, "min_tokens": PAGE, "min_members": 2} | options
    found = find_prefix_groups(np.array(table), np.array(full), **options)
    return sorted((g.num_tokens // PAGE, g.members.tolist()) for g in found)


def test_groups_share_the_pages_that_save_the_most_reads():
    table = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [8, 9, 0, 0], [8, 9, 0, 0], [10, 0, 0, 0]]
    assert groups_of(table, [4, 4, 4, 2, 2, 1]) == [(2, [0, 1, 2]), (2, [3, 4])]
    # Two long branches under one short page save more apart.
    branches = [[1, *range(2, 9)], [1, *range(2, 9)], [1, *range(20, 27)], [1, *range(20, 27)]]
    assert groups_of(branches, [8] * 4) == [(8, [0, 1]), (8, [2, 3])]


def test_groups_need_full_pages_tokens_and_members():
    table = [[1, 2, 3], [1, 2, 3], [1, 2, 4]]
    assert groups_of(table, [3, 1, 3]) == [(2, [0, 2])]
    assert groups_of(table, [3, 1, 1]) == [(1, [0, 1, 2])]
    assert groups_of(table, [0, 0, 3]) == []
    assert groups_of(table, [3, 3, 3], min_members=4) == []
    assert groups_of(table, [3, 3, 3], min_tokens=4 * PAGE) == []


@settings(max_examples=50, deadline=None)
@given(
    paths=st.lists(st.lists(st.integers(0, 2), max_size=6), max_size=12),
    few=st.integers(2, 4),
    least=st.integers(1, 3),
)
def test_groups_are_disjoint_and_share_what_they_claim(paths, few, least):
    ids = {}
    table = np.zeros((len(paths), 8), dtype=np.int32)
    for s, path in enumerate(paths):
        for j in range(len(path)):
            table[s, j] = ids.setdefault(tuple(path[: j + 1]), len(ids))
    full = np.array([len(path) for path in paths], dtype=np.int64)
    found = find_prefix_groups(table, full, page_size=PAGE, min_tokens=least * PAGE, min_members=few)
    members = [m for g in found for m in g.members.tolist()]
    assert len(members) == len(set(members))
    for g in found:
        pages = g.num_tokens // PAGE
        assert pages >= least
        assert len(g.members) >= few
        assert (full[g.members] >= pages).all()
        assert (table[g.members, :pages] == table[g.page_row, :pages]).all()
