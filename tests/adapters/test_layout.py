"""Laws of an adapter's layout, over random ranks, shapes and page sizes."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.adapters.layout import ALIGN_BYTES, AdapterLayout, plan_layout
from polybatch.errors import AdapterError

MODULES = ("q_proj", "k_proj", "up_proj", "down_proj")
Ranks = list[dict[str, tuple[int, bool, bool]]]

shapes_strategy = st.fixed_dictionaries(
    {module: st.tuples(st.integers(1, 300), st.integers(1, 300)) for module in MODULES}
)
ranks_strategy = st.lists(
    st.dictionaries(st.sampled_from(MODULES), st.tuples(st.integers(0, 20), st.booleans(), st.booleans())),
    max_size=4,
)


def rows_of(
    layout: AdapterLayout, layer: int, ranks: Ranks, shapes: dict[str, tuple[int, int]], itemsize: int
) -> list[tuple[int, int, int]]:
    """(page, first byte, end) of every row of a layer."""
    rows = []
    for module, (rank, has_gain, has_bias) in ranks[layer].items():
        out, in_ = shapes[module]
        table = layout.layers[layer][module]
        assert len(table.a_page) == len(table.a_offset) == len(table.b_page) == len(table.b_offset) == rank
        assert (table.gain is not None, table.bias is not None) == (has_gain, has_bias)
        places = [(p, o, in_) for p, o in zip(table.a_page, table.a_offset, strict=True)]
        places += [(p, o, out) for p, o in zip(table.b_page, table.b_offset, strict=True)]
        places += [(*place, out) for place in (table.gain, table.bias) if place]
        rows += [(int(p), int(o), int(o) + n * itemsize) for p, o, n in places]
    return rows


@settings(max_examples=60, deadline=None)
@given(ranks_strategy, shapes_strategy, st.sampled_from([2, 4]), st.integers(0, 4000))
def test_rows_are_aligned_disjoint_and_inside_their_pages(
    ranks: Ranks, shapes: dict[str, tuple[int, int]], itemsize: int, spare: int
) -> None:
    page_bytes = max(max(shape) for shape in shapes.values()) * itemsize + spare
    layout = plan_layout(ranks, shapes, itemsize, page_bytes)
    used_pages = 0
    for layer in range(len(ranks)):
        rows = sorted(rows_of(layout, layer, ranks, shapes, itemsize))
        for page, start, end in rows:
            assert 0 <= page < layout.num_pages
            assert start % ALIGN_BYTES == 0
            assert end <= page_bytes
            used_pages = max(used_pages, page + 1)
        for (page, _, end), (next_page, start, _) in pairwise(rows):
            assert page != next_page or end <= start
    assert used_pages == layout.num_pages
    assert layout.used_bytes == sum(
        end - start
        for layer in range(len(ranks))
        for _, start, end in rows_of(layout, layer, ranks, shapes, itemsize)
    )


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.sampled_from(MODULES), st.integers(1, 64), min_size=1), st.integers(1, 8))
def test_all_pages_but_the_last_are_more_than_half_full(ranks: dict[str, int], rows_per_page: int) -> None:
    shapes = {"q_proj": (576, 576), "k_proj": (192, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
    page_bytes = 1536 * 2 * rows_per_page
    layout = plan_layout([{m: (r, False, False) for m, r in ranks.items()}], shapes, 2, page_bytes)
    assert layout.used_bytes > (layout.num_pages - 1) * page_bytes / 2


def test_a_real_models_adapter_wastes_little() -> None:
    shapes = {
        "q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576),
        "gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536),
    }  # fmt: skip
    ranks: Ranks = [dict.fromkeys(shapes, (16, False, False)) for _ in range(30)]
    layout = plan_layout(ranks, shapes, 2, 16 * 2 * 192 * 2)
    assert layout.utilisation > 0.95


def test_rows_of_a_block_are_a_fixed_stride_apart_within_a_page() -> None:
    layout = plan_layout([{"q_proj": (8, False, False)}], {"q_proj": (100, 50)}, 4, 100 * 4 * 64)
    table = layout.layers[0]["q_proj"]
    assert layout.num_pages == 1
    assert {int(step) for step in table.a_offset[1:] - table.a_offset[:-1]} == {256}
    assert {int(step) for step in table.b_offset[1:] - table.b_offset[:-1]} == {448}


def test_the_largest_layer_sets_the_number_of_pages() -> None:
    shapes = {"q_proj": (64, 64)}
    layout = plan_layout([{"q_proj": (1, False, False)}, {}, {"q_proj": (8, True, True)}], shapes, 4, 512)
    assert layout.num_pages == 9
    assert layout.layers[1] == {}


def test_an_empty_adapter_takes_no_page() -> None:
    assert plan_layout([{}, {}], {}, 4, 512).num_pages == 0


def test_a_row_longer_than_a_page_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"q_proj\.b has 400 bytes, a page 396"):
        plan_layout([{"q_proj": (1, False, False)}], {"q_proj": (100, 50)}, 4, 396)


def test_layout_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import polybatch.adapters.layout"
    subprocess.run([sys.executable, "-c", code], check=True)
