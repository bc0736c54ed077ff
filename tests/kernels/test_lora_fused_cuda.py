"""Kernels that add an adapter to what they read, against the separate expand and the plain kernels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_helpers import ModuleRows, arrays_of, build_world, expected_of, on_device

from polybatch.kernels.activation import silu_mul
from polybatch.kernels.lora import work
from polybatch.kernels.lora.work import GROUPS, LoraLimits
from polybatch.kernels.norm.cuda import rms_norm
from polybatch.kernels.write_kv.cuda import rope_table, write_kv

pytest.importorskip("triton")
from polybatch.kernels.lora import cuda_fused
from polybatch.kernels.lora.cuda import CudaLora
from polybatch.kernels.lora.cuda_fused import DOWN, GATE_UP, QKV, FusedLora, O

HEADS, KV_HEADS, DIM, PAGE_SIZE = 5, 2, 24, 4
HIDDEN, WIDE = 80, 150
SHAPES = {
    "q_proj": (HEADS * DIM, HIDDEN), "k_proj": (KV_HEADS * DIM, HIDDEN), "v_proj": (KV_HEADS * DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * DIM), "gate_proj": (WIDE, HIDDEN), "up_proj": (WIDE, HIDDEN),
    "down_proj": (HIDDEN, WIDE),
}  # fmt: skip
CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

CASES = {
    "single rows": ([(0, 1, 0), (1, 2, 1), (3, 4, 2)], False, 5),
    "rows that share a program": ([(0, 4, 0), (4, 6, 1), (7, 26, 2)], False, 28),
    "no adapter": ([], False, 3),
    "long chunks alone": ([(0, 70, 0), (70, 134, 1)], True, 134),
    "a long chunk of few rows of B": ([(0, 70, 1)], True, 71),
    "tiles of all rows that share them": ([(0, 16, 0), (16, 21, 1)], False, 21),
    "tiles of any length, few rows of B": ([(0, 2, 1), (2, 7, 1), (7, 17, 1), (18, 20, 0)], False, 21),
    "long and short chunks": ([(0, 3, 1), (5, 75, 0)], True, 78),
    "rows before, between and after chunks": ([(6, 8, 2), (9, 80, 0)], True, 82),
}


@pytest.fixture(autouse=True)
def _few_rows_are_many(monkeypatch):
    monkeypatch.setattr(work, "MIN_BASE_ROWS", 5)


class Step:
    """Random adapters of three kinds, x of one group with NaN in rows without one, and what y must become."""

    def __init__(self, group, case, dtype=torch.float32, seed=0):
        segments, wide, num_rows = CASES[case] if isinstance(case, str) else case
        self.generator = torch.Generator().manual_seed(seed)
        modules = GROUPS[group]
        kinds = [
            {m: ModuleRows(17, i == 0, True) for i, m in enumerate(modules)},
            {modules[-1]: ModuleRows(3, True, False)},
            dict(zip(modules, (ModuleRows(1), ModuleRows(20), ModuleRows(0, True)), strict=False)),
        ]
        self.world = build_world(SHAPES, [[{}, kind] for kind in kinds], 2048, dtype, self.generator)
        shape = self.world.groups[group]
        x = torch.full((num_rows, shape.num_in), torch.nan, dtype=dtype)
        for start, stop, _ in segments:
            x[start:stop] = self.random(stop - start, shape.num_in).to(dtype)
        self.y = self.random(num_rows, sum(shape.outs)).to(dtype)
        views = arrays_of(LoraLimits(num_rows + 3, 8))
        plan = work.fill(views, np.array(segments), self.world.templates, self.world.groups, 1 << 20,
                         num_rows=num_rows, wide=wide)  # fmt: skip
        lora = CudaLora(self.world.groups, dtype, CPU, 1 << 20, num_programs=3)
        lora.h.fill_(torch.nan)
        self.memory, arrays = self.world.memory[1], on_device(views)
        lora.shrink(group, 1, x, self.memory, self.world.words, arrays, plan)
        self.plan, self.num_rows = plan, num_rows
        self.fused = FusedLora(lora, self.world.words, arrays, plan, num_rows)
        self.expected = expected_of(self.world, group, 1, x, self.y, segments).to(dtype)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)


@pytest.mark.parametrize("case", CASES)
def test_silu_mul_gets_the_adapters_of_gate_and_up(case):
    step = Step(GATE_UP, case)
    out = torch.full((step.num_rows, WIDE), torch.nan)
    step.fused.silu_mul(1, step.memory, step.y, out)
    torch.testing.assert_close(out, silu_mul(step.expected), **CLOSE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("group", [O, DOWN])
def test_the_norm_gets_the_adapters_of_o_and_down_and_writes_in_place(case, group):
    step = Step(group, case)
    residual, weight = step.random(step.num_rows, HIDDEN), step.random(HIDDEN)
    expected_residual = residual.clone()
    expected = rms_norm(step.expected, weight, 1e-5, residual=expected_residual)
    step.fused.rms_norm(group, 1, step.memory, step.y, weight, 1e-5, residual=residual, out=step.y)
    torch.testing.assert_close(step.y, expected, **CLOSE)
    torch.testing.assert_close(residual, expected_residual, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_chosen_rows_get_their_adapters_wherever_their_tile_begins(case):
    step = Step(DOWN, case)
    residual, weight = step.random(step.num_rows, HIDDEN), step.random(HIDDEN)
    rows = torch.tensor([step.num_rows - 1, -1, 2, 0, 1], dtype=torch.int32)
    out = torch.full((5, HIDDEN), torch.nan)
    before = residual.clone()
    step.fused.rms_norm(DOWN, 1, step.memory, step.y, weight, 1e-5, residual=residual, out=out, rows=rows)
    expected = rms_norm(step.expected, weight, 1e-5, residual=residual.clone())
    torch.testing.assert_close(out[rows >= 0], expected[rows[rows >= 0].long()], **CLOSE)
    assert out[1].isnan().all()
    assert torch.equal(residual, before)


@pytest.mark.parametrize("elements", [1, 1 << 10, 1 << 16])
def test_the_norm_takes_rows_of_b_in_turns_of_any_size(elements, monkeypatch):
    monkeypatch.setattr(cuda_fused, "NORM_ROWS", (elements, 4))
    test_the_norm_gets_the_adapters_of_o_and_down_and_writes_in_place("rows that share a program", O)


@pytest.mark.parametrize(
    ("case", "full"),
    [
        *((case, True) for case in CASES),
        *((case, False) for case in ("single rows", "rows that share a program", "long and short chunks")),
    ],
)
def test_write_kv_gets_the_adapters_of_q_k_and_v_before_bias_norm_and_rotation(case, full):
    step = Step(QKV, case)
    num_pages = step.num_rows // PAGE_SIZE + 2
    slots = torch.randperm(num_pages * PAGE_SIZE, generator=step.generator)[: step.num_rows].int()
    positions = torch.randint(0, 50, (step.num_rows,), generator=step.generator, dtype=torch.int32)
    # A row that only fills up a graph.
    slots[-1], positions[-1] = -1, 10**6
    table = rope_table(100.0 ** -(torch.arange(DIM // 2) / 12), 1.0, 50)
    more = {}
    if full:
        more = {"bias": step.random(step.y.shape[1]), "q_norm": step.random(DIM), "k_norm": step.random(DIM),
                "eps": 1e-5}  # fmt: skip
    pages, expected_pages = torch.full((2, num_pages, 2, KV_HEADS, PAGE_SIZE, DIM), torch.nan)
    q = step.fused.write_kv(1, step.memory, step.y, positions, slots, table, pages, **more)
    expected = write_kv(step.expected, positions, slots, table, expected_pages, **more)
    torch.testing.assert_close(q[:-1], expected[:-1], **CLOSE)
    torch.testing.assert_close(pages, expected_pages, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("case", ["single rows", "long and short chunks"])
def test_what_is_added_is_rounded_as_if_it_had_been_written(case):
    # float16, because the interpreter cannot multiply matrices of bfloat16
    step = Step(GATE_UP, case, torch.float16)
    out = torch.full((step.num_rows, WIDE), torch.nan, dtype=torch.float16)
    step.fused.silu_mul(1, step.memory, step.y, out)
    # float32 may tip a sum over a rounding edge, and the interpreter an exponential.
    assert (out != silu_mul(step.expected)).float().mean() < 0.02


@st.composite
def segments_of_step(draw):
    segments, at = [], 0
    for length, adapter in draw(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 2)), max_size=4)):
        if adapter >= 0:
            segments.append((at, at + length, adapter))
        at += length
    return segments, False, at + draw(st.integers(1, 3))


@settings(max_examples=8, deadline=None)
@given(case=segments_of_step(), group=st.sampled_from([O, DOWN]), seed=st.integers(0, 99))
def test_any_segments_reach_the_norm(case, group, seed):
    step = Step(group, case, seed=seed)
    residual, weight = step.random(step.num_rows, HIDDEN), step.random(HIDDEN)
    expected = rms_norm(step.expected, weight, 1e-5, residual=residual.clone())
    step.fused.rms_norm(group, 1, step.memory, step.y, weight, 1e-5, residual=residual, out=step.y)
    torch.testing.assert_close(step.y, expected, **CLOSE)


@pytest.mark.parametrize(("max_h", "fits"), [(1 << 20, True), (1 << 16, False)])
def test_down_of_long_chunks_needs_no_shrink_after_silu_mul_where_its_parts_fit(max_h, fits):
    generator = torch.Generator().manual_seed(5)
    modules, ranks = (*GROUPS[GATE_UP], *GROUPS[DOWN]), (17, 3, 40)
    kinds = [
        {m: ModuleRows(rank, i == 2, i == 0) for i, (m, rank) in enumerate(zip(modules, some, strict=True))}
        for some in (ranks, ranks[::-1], (0, 0, 4))
    ]
    world = build_world(SHAPES, [[{}, kind] for kind in kinds], 2048, torch.float32, generator)
    segments, n = [(0, 66, 0), (66, 68, 1), (69, 135, 1), (135, 199, 2)], 200
    x, y = torch.randn(n, HIDDEN, generator=generator), torch.randn(n, 2 * WIDE, generator=generator)
    base, residual, weight = torch.randn(3, n, HIDDEN, generator=generator)
    views = arrays_of(LoraLimits(n, 8))
    plan = work.fill(views, np.array(segments), world.templates, world.groups, max_h, num_rows=n, wide=True,
                     is_fused=True)  # fmt: skip
    assert plan.is_fusable
    first, last, *tiles = views["lora_bounds"][0, work.WIDE, DOWN].tolist()
    assert (first == last) == fits
    parts = set(views["lora_tiles"][slice(*tiles), DOWN, work.PARTS].tolist())
    assert parts == {work.DOWN_PARTS if fits else plan.wide_parts}
    arrays = on_device(views)
    lora = CudaLora(world.groups, torch.float32, CPU, max_h, num_programs=3)
    lora.h.fill_(torch.nan)
    fused = FusedLora(lora, world.words, arrays, plan, n)
    memory = world.memory[1]
    activated, out = torch.empty(n, WIDE), torch.empty(n, HIDDEN)
    lora.shrink(GATE_UP, 1, x, memory, world.words, arrays, plan)
    fused.silu_mul(1, memory, y, activated)
    lora.shrink(DOWN, 1, activated, memory, world.words, arrays, plan)
    fused.rms_norm(DOWN, 1, memory, base, weight, 1e-5, residual=residual.clone(), out=out)
    wanted = silu_mul(expected_of(world, GATE_UP, 1, x, y, segments).float())
    torch.testing.assert_close(activated, wanted, **CLOSE)
    summed = expected_of(world, DOWN, 1, wanted, base, segments).float()
    torch.testing.assert_close(out, rms_norm(summed, weight, 1e-5, residual=residual), **CLOSE)
