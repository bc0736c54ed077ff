"""lora's Triton kernels, interpreted, against float64 over random segments, ranks and rounds."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import ModuleRows, arrays_of, build_world, expected_of, on_device

from polybatch.errors import EngineError
from polybatch.kernels.lora import work
from polybatch.kernels.lora.work import GROUPS, LoraLimits

pytest.importorskip("triton")
from polybatch.kernels.lora.cuda import CudaLora

SHAPES = {
    "q_proj": (96, 80), "k_proj": (40, 80), "v_proj": (40, 80), "o_proj": (80, 96),
    "gate_proj": (272, 80), "up_proj": (272, 80), "down_proj": (80, 530),
}  # fmt: skip
CPU = torch.device("cpu")


def run(world, group, layer, segments, *, wide, dtype=torch.float32, max_h=1 << 20, seed=0, num_programs=3):
    """(result, expected, y before) for random x and y, with rows in no segment full of NaN in x."""
    generator = torch.Generator().manual_seed(seed)
    shape = world.groups[group]
    num_tokens = max((stop for _, stop, _ in segments), default=0) + 2
    x = torch.full((num_tokens, shape.num_in), torch.nan, dtype=dtype)
    for start, stop, _ in segments:
        x[start:stop] = torch.randn(stop - start, shape.num_in, generator=generator).to(dtype)
    y = torch.randn(num_tokens, sum(shape.outs), generator=generator).to(dtype)
    limits = LoraLimits(num_tokens, 64, max_h)
    views = arrays_of(limits)
    plan = work.fill(
        views, np.array(segments), world.templates, world.groups, max_h, num_rows=num_tokens, wide=wide
    )
    lora = CudaLora(world.groups, dtype, CPU, max_h, num_programs=num_programs)
    lora.h.fill_(torch.nan)
    result = y.clone()
    lora(group, layer, x, result, world.memory[layer], world.words, on_device(views), plan)
    return result, expected_of(world, group, layer, x, y, segments), y, plan


def modules_of(group):
    return st.fixed_dictionaries({}, optional={
        module: st.builds(ModuleRows, st.sampled_from([0, 1, 4, 17]), st.booleans(), st.booleans())
        for module in GROUPS[group]
    })  # fmt: skip


@st.composite
def cases(draw):
    group = draw(st.integers(0, 3))
    num_layers = draw(st.integers(1, 2))
    adapters = draw(st.lists(st.lists(modules_of(group), min_size=num_layers, max_size=num_layers),
                             min_size=1, max_size=3))  # fmt: skip
    segments, at = [], 0
    for length, adapter in draw(st.lists(st.tuples(st.integers(1, 19), st.integers(-1, 2)), max_size=4)):
        if 0 <= adapter < len(adapters):
            segments.append((at, at + length, adapter))
        at += length
    return group, adapters, segments, draw(st.integers(0, num_layers - 1)), draw(st.integers(0, 999))


@settings(max_examples=12, deadline=None)
@given(case=cases())
def test_every_token_gets_its_adapter_and_other_tokens_keep_their_bits(case):
    group, adapters, segments, layer, seed = case
    world = build_world(SHAPES, adapters, 4096, torch.float32, torch.Generator().manual_seed(seed))
    result, expected, before, _ = run(world, group, layer, segments, wide=False, seed=seed)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    covered = {t for start, stop, _ in segments for t in range(start, stop)}
    base = [t for t in range(len(before)) if t not in covered]
    assert torch.equal(result[base], before[base])


@pytest.mark.parametrize("group", range(4))
def test_wide_tiles_and_narrow_tiles_share_a_step(group):
    ranks = {module: ModuleRows(rank, module == "up_proj", module == "o_proj")
             for module, rank in zip(GROUPS[group], (17, 3, 40), strict=False)}  # fmt: skip
    world = build_world(SHAPES, [[ranks], [ranks]], 4096, torch.float32, torch.Generator().manual_seed(7))
    segments = [(0, 70, 0), (70, 75, 1), (76, 160, 1)]
    result, expected, _, plan = run(world, group, 0, segments, wide=True)
    assert plan.rounds == ((True, True),)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_rank_of_many_blocks_is_shared_by_few_items():
    rows = {"o_proj": ModuleRows(200)}
    world = build_world(SHAPES, [[rows], [{"o_proj": ModuleRows(1)}]], 4096, torch.float32,
                        torch.Generator().manual_seed(1))  # fmt: skip
    result, expected, _, plan = run(world, 1, 0, [(0, 3, 0), (3, 20, 1)], wide=False)
    assert plan == work.GRAPH_PLAN
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wide", [False, True])
def test_what_does_not_fit_the_scratch_buffer_is_done_in_rounds(wide):
    rows = {"q_proj": ModuleRows(64), "v_proj": ModuleRows(200, True)}
    world = build_world(SHAPES, [[rows]], 4096, torch.float32, torch.Generator().manual_seed(2))
    result, expected, _, plan = run(world, 0, 0, [(0, 66, 0), (70, 74, 0)], wide=wide, max_h=9000)
    assert len(plan.rounds) > 1
    assert plan != work.GRAPH_PLAN
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def test_16_bit_results_are_rounded_once():
    # float16, because the interpreter cannot multiply matrices of bfloat16
    rows = {"gate_proj": ModuleRows(17), "up_proj": ModuleRows(4, True, True)}
    world = build_world(SHAPES, [[rows]], 2048, torch.float16, torch.Generator().manual_seed(3))
    result, expected, _, _ = run(world, 2, 0, [(0, 9, 0)], wide=False, dtype=torch.float16)
    # Half a unit in the last place, and float32's errors.
    torch.testing.assert_close(result.double(), expected, rtol=2**-11 * 1.05, atol=1e-5)


def test_a_step_without_adapters_launches_programs_that_touch_nothing():
    world = build_world(SHAPES, [[{}]], 4096, torch.float32, torch.Generator().manual_seed(4))
    for segments in ([], [(0, 4, 0)]):
        result, _, before, plan = run(world, 0, 0, segments, wide=False)
        assert plan == work.GRAPH_PLAN
        assert torch.equal(result, before)


@given(
    lengths=st.lists(st.integers(1, 90), max_size=6),
    ranks=st.lists(st.sampled_from([0, 1, 16, 130]), min_size=1, max_size=4),
    wide=st.booleans(),
    max_h=st.sampled_from([5000, 1 << 16, 1 << 22]),
)
@settings(max_examples=25, deadline=None)
def test_tiles_cover_each_token_once_and_rounds_never_overlap_in_scratch(lengths, ranks, wide, max_h):
    adapters = [[{"q_proj": ModuleRows(rank), "down_proj": ModuleRows(rank // 2)}] for rank in ranks]
    templates = build_templates(adapters)
    segments, at = [], 0
    for i, length in enumerate(lengths):
        segments.append((at, at + length, i % len(ranks)))
        at += length
    shapes = work.group_shapes(SHAPES)
    limits = LoraLimits(4096, 4096, max_h)
    views = arrays_of(limits)
    plan = work.fill(views, np.array(segments), templates, shapes, max_h, num_rows=at, wide=wide)
    tokens = []
    for round_ in range(len(plan.rounds)):
        used = []
        for variant in (work.NARROW, work.WIDE):
            first_item, last_item, low, high = views["lora_bounds"][round_, variant, 0].tolist()
            assert plan.rounds[round_][variant] >= (high > low)
            items = views["lora_items"][0, first_item:last_item]
            assert set((items // work.TILE_ITEMS).tolist()) == {
                t for t in range(low, high) if views["lora_tiles"][t, 0, work.RANK]
            }
            for record in views["lora_tiles"][low:high, 0]:
                tokens += range(record[work.FIRST], record[work.FIRST] + record[work.NUM_TOKENS])
                assert record[work.PARTS] == (plan.wide_parts if variant else shapes[0].narrow_parts)
                size = int(record[work.NUM_TOKENS] * record[work.RANK] * record[work.PARTS])
                used.append((int(record[work.H_START]), int(record[work.H_START]) + size))
        used.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))
        assert not used or used[-1][1] <= max_h
    live = [t for start, stop, n in segments for t in range(start, stop) if ranks[n]]
    assert sorted(tokens) == live


def build_templates(adapters):
    from polybatch.adapters.layout import plan_layout
    from polybatch.execution.adapter_words import adapter_words

    return np.stack([adapter_words(plan_layout(a, SHAPES, 4, 4096)).template_at(0) for a in adapters])


def test_one_token_too_large_for_the_scratch_buffer_is_an_error_with_a_way_out():
    templates = build_templates([[{"q_proj": ModuleRows(1000)}]])
    limits = LoraLimits(16, 1, 999)
    with pytest.raises(EngineError, match="max_h"):
        work.fill(
            arrays_of(limits),
            np.array([(0, 1, 0)]),
            templates,
            work.group_shapes(SHAPES),
            999,
            num_rows=1,
            wide=False,
        )


@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
def test_prefills_of_adapters_on_all_modules_launch_what_startup_compiled(rank):
    shapes = {module: (64, 64) for modules in GROUPS for module in modules}
    world = build_world(shapes, [[{m: ModuleRows(rank) for m in shapes}]], 4096, torch.float32,
                        torch.Generator().manual_seed(0))  # fmt: skip
    views = arrays_of(LoraLimits(200, 4))
    plan = work.fill(views, np.array([(0, 3, 0), (3, 190, 0)]), world.templates, world.groups, 1 << 22,
                     num_rows=190, wide=True)  # fmt: skip
    compiled = {(p.wide_ranks, p.is_long) for p in work.common_mixed_plans()}
    assert plan.num_wide
    assert (plan.wide_ranks, plan.is_long) in compiled


def test_tiles_are_dense_where_enough_narrow_rows_share_them():
    shapes = {module: (64, 64) for modules in GROUPS for module in modules}
    world = build_world(shapes, [[{"q_proj": ModuleRows(4)}]], 4096, torch.float32,
                        torch.Generator().manual_seed(0))  # fmt: skip
    views = arrays_of(LoraLimits(200, 4))
    segments = np.array([(0, work.FEW_ROWS, 0), (5, 5 + 17 + work.FEW_ROWS, 0), (30, 100, 0)])
    work.fill(views, segments, world.templates, world.groups, 1 << 20, num_rows=101, wide=True)
    dense = np.flatnonzero(views["lora_rows"][work.LEADS, :101] == work.DENSE)
    assert dense.tolist() == list(range(5, 22 + work.FEW_ROWS))


@given(
    spans=st.lists(st.tuples(st.integers(1, 80), st.booleans()), max_size=6),
    wide=st.booleans(),
    padding=st.integers(0, 20),
)
@settings(max_examples=25, deadline=None)
def test_units_hold_every_row_once_but_those_of_wide_tiles_and_plain_kernels(spans, wide, padding):
    templates = build_templates([[{"q_proj": ModuleRows(4)}]])
    segments, at = [], 0
    for length, is_adapted in spans:
        if is_adapted:
            segments.append((at, at + length, 0))
        at += length
    num_rows = at + padding
    views = arrays_of(LoraLimits(1024, 64))
    plan = work.fill(views, np.array(segments), templates, work.group_shapes(SHAPES), 1 << 20,
                     num_rows=num_rows, wide=wide)  # fmt: skip
    units = views["lora_units"][1 : 1 + views["lora_units"][0, 0]]
    assert len(units) == (plan.num_units or len(units)) <= num_rows
    held, parts = [], {}
    for first, count, tile, part in units.tolist():
        rows = range(first, first + count)
        assert all(views["lora_rows"][work.TILE, row] == tile for row in rows)
        if tile == work.ABSENT:
            assert count <= work.BASE_ROWS
        else:
            assert views["lora_rows"][work.TOKEN, rows].tolist() == list(range(count))
            assert count == views["lora_tiles"][tile, 0, work.NUM_TOKENS]
            parts.setdefault((tile, count), []).append(part)
        held += rows if part == 0 else ()
    for (_, count), found in parts.items():
        num_units = 1 if count == 1 else work.TILE_UNITS if count > work.HALF_ROWS else work.HALF_UNITS
        assert sorted(found) == list(range(num_units))
    is_wide = [wide and stop - start >= work.WIDE_TOKENS for start, stop, _ in segments]
    skipped = {r for (a, b, _), w in zip(segments, is_wide, strict=True) if w for r in range(a, b)}
    assert sorted(held) == [row for row in range(plan.num_base, num_rows) if row not in skipped]
