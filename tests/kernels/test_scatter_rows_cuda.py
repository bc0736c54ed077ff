"""scatter_rows for CUDA in the interpreter: every row where the table says, and nothing beside it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.kernels.scatter_rows import cuda, reference

LAYERS, NUM_PAGES, PAGE_BYTES = 2, 5, 1024


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 63), max_size=40),
    kind=st.sampled_from([(torch.int32, 4), (torch.int32, 1), (torch.int16, 1)]),
    data_start=st.sampled_from([0, 16, 48]),
    seed=st.integers(0, 99),
)
def test_rows_arrive_where_the_table_says_and_nowhere_else(lengths, kind, data_start, seed):
    dtype, unit = kind
    generator = torch.Generator().manual_seed(seed)
    step = 64 // dtype.itemsize
    places, place = [], 0
    for length in lengths:
        room = PAGE_BYTES // 64 - place % (PAGE_BYTES // 64)
        taken = -(-length * unit // step)
        if taken > room:
            place += room
        places.append(place)
        place += taken
    pages = torch.randperm(NUM_PAGES, generator=generator).to(torch.int32)
    num_held = sum(at + 16 <= NUM_PAGES * PAGE_BYTES // 64 for at in places)
    order = torch.randperm(num_held, generator=generator).tolist()
    starts = [sum(lengths[:i]) for i in range(num_held)]
    table = torch.tensor(
        [[starts[i], lengths[i], i % LAYERS, places[i]] for i in order], dtype=torch.int32
    ).view(-1, 4)
    data = torch.randint(1, 9999, (data_start + sum(lengths) * unit,), generator=generator).to(dtype)
    expected = torch.full((LAYERS, NUM_PAGES, PAGE_BYTES // dtype.itemsize), -1, dtype=dtype)
    arena = expected.clone()
    reference.scatter_rows(table, data[data_start:], pages, expected, unit)
    cuda.scatter_rows(table.view(-1), data, pages, arena, unit, num_rows=num_held, data_start=data_start)
    assert torch.equal(arena, expected)


@pytest.mark.parametrize("place", [0, 3, 15])
def test_the_reference_puts_a_row_on_its_page(place):
    arena = torch.zeros(LAYERS, NUM_PAGES, PAGE_BYTES // 4, dtype=torch.int32)
    pages = torch.tensor([4, 2], dtype=torch.int32)
    table = torch.tensor([[2, 16, 1, 16 + place]], dtype=torch.int32)
    data = torch.arange(100, dtype=torch.int32) + 1
    reference.scatter_rows(table, data, pages, arena, 1)
    assert torch.equal(arena[1, 2, place * 16 : place * 16 + 16], data[2:18])
    assert arena.count_nonzero() == 16
