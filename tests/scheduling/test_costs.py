"""The amounts of a step are what its chunks hold, and the model is linear in them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.request import AdapterRef, Request, SamplingParams, Sequence
from polybatch.scheduling.costs import (
    COEFFICIENTS,
    SHAPE_FIELDS,
    CostModel,
    StepShape,
    amounts,
    shape_of,
)
from polybatch.scheduling.plan import AdapterLoad, Chunk, LogitRows, StepPlan

REFS = [AdapterRef(name, name * 8, pages) for name, pages in (("a", 3), ("b", 5))]


def chunk(
    start: int,
    n_new: int,
    logits: LogitRows = LogitRows.LAST,
    adapter: AdapterRef | None = None,
    pages: list[int] | None = None,
) -> Chunk:
    seq = Sequence(Request("r", (1,) * (start + n_new), SamplingParams(), 1, 0, adapter=adapter))
    seq.pages = pages or []
    return Chunk(seq, start, n_new, logits)


def plan_of(*chunks: Chunk, loads: tuple[AdapterLoad, ...] = ()) -> StepPlan:
    used = {c.seq.adapter for c in chunks} - {None}
    resident = {ref.digest: tuple(range(ref.num_pages)) for ref in used if ref is not None}
    return StepPlan(chunks, loads=loads, resident=resident)


chunks = st.builds(
    chunk,
    st.integers(0, 300),
    st.one_of(st.just(1), st.integers(1, 80)),
    st.sampled_from(LogitRows),
    st.sampled_from([None, *REFS]),
)


@given(st.lists(chunks, min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_amounts_are_sums_over_the_chunks(found: list[Chunk]) -> None:
    shape = shape_of(plan_of(*found))
    decodes = [c for c in found if c.n_new == 1]
    prefills = [c for c in found if c.n_new > 1]
    adapted = [c for c in found if c.seq.adapter is not None]
    assert shape.num_tokens == sum(c.n_new for c in found)
    assert (shape.num_decodes, shape.num_prefills) == (len(decodes), len(prefills))
    assert shape.num_prefill_tokens == sum(c.n_new for c in prefills)
    assert shape.decode_context == sum(c.start + 1 for c in decodes)
    assert shape.prefill_context == sum(c.start + c.n_new for c in prefills)
    assert shape.prefill_pairs == sum(c.start + i + 1 for c in prefills for i in range(c.n_new))
    rows = {LogitRows.NONE: lambda n: 0, LogitRows.LAST: lambda n: 1, LogitRows.ALL: lambda n: n}
    assert shape.num_logits == sum(rows[c.logits](c.n_new) for c in found)
    assert shape.num_adapters == len({c.seq.adapter for c in adapted})
    assert shape.adapter_tokens == sum(c.n_new for c in adapted)
    assert shape.adapter_work == sum(c.n_new * c.seq.adapter.num_pages for c in adapted if c.seq.adapter)
    assert shape.adapter_pages == sum(ref.num_pages for ref in {c.seq.adapter for c in adapted} if ref)
    assert shape.largest_adapter == max(
        (c.seq.adapter.num_pages for c in adapted if c.seq.adapter), default=0
    )


def test_loads_count_their_pages_whoever_uses_them() -> None:
    loads = (AdapterLoad(REFS[0], (1, 2, 3)), AdapterLoad(REFS[1], (4, 5, 6, 7, 8)))
    assert shape_of(plan_of(chunk(3, 1), loads=loads)).load_pages == 8


def rows_with(prefix: int, own: int, count: int, first: int = 1000) -> list[Chunk]:
    """Decoding rows with `prefix` pages in common and `own` of their own."""
    return [
        chunk(
            16 * (prefix + own) - 1, 1,
            pages=[*range(prefix), *range(first + 100 * i, first + 100 * i + own)],
        )
        for i in range(count)
    ]  # fmt: skip


def test_a_prefix_of_several_rows_is_shared_from_its_second_reading_on() -> None:
    assert shape_of(plan_of(*rows_with(20, 4, 5))).shared_context == 4 * 20 * 16


def test_prefixes_too_short_or_of_too_few_rows_are_not_shared() -> None:
    assert shape_of(plan_of(*rows_with(7, 9, 5))).shared_context == 0
    assert shape_of(plan_of(*rows_with(20, 4, 2))).shared_context == 0
    assert shape_of(plan_of(*rows_with(0, 20, 5))).shared_context == 0


def test_groups_share_each_by_themselves_beside_short_rows_and_prefills() -> None:
    other = [
        chunk(16 * 14 - 1, 1, pages=[*range(500, 510), *range(9000 + 10 * i, 9004 + 10 * i)])
        for i in range(3)
    ]
    short = [chunk(3, 1, pages=[7777]), chunk(100, 28, pages=list(range(20)))]
    found = shape_of(plan_of(*rows_with(20, 4, 5), *short, *other)).shared_context
    assert found == (4 * 20 + 2 * 10) * 16


@given(st.integers(8, 60), st.integers(1, 40), st.integers(3, 9))
@settings(max_examples=30, deadline=None)
def test_sharing_is_as_long_as_the_common_pages(prefix: int, own: int, count: int) -> None:
    assert shape_of(plan_of(*rows_with(prefix, own, count))).shared_context == (count - 1) * prefix * 16


shapes = st.builds(StepShape, **{name: st.integers(0, 1000) for name in SHAPE_FIELDS})
models = st.builds(
    CostModel, hinge=st.integers(0, 900), **{name: st.floats(0, 1e-3) for name in COEFFICIENTS}
)


@given(models, shapes)
@settings(max_examples=40, deadline=None)
def test_a_prediction_is_coefficients_times_amounts(model: CostModel, shape: StepShape) -> None:
    expected = sum(
        getattr(model, name) * amount
        for name, amount in zip(COEFFICIENTS, amounts(shape, model.hinge), strict=True)
    )
    assert model.predict(shape) == pytest.approx(expected)


def test_every_coefficient_is_a_field_of_the_model_and_every_amount_can_matter() -> None:
    others = {"hinge", "row_sizes", "mixed_sizes"}
    assert {*COEFFICIENTS, *others} == {field.name for field in fields(CostModel)}
    shape = StepShape(**dict.fromkeys(SHAPE_FIELDS, 7) | {"decode_context": 20})
    assert min(amounts(shape, 3)) > 0


def test_steps_are_padded_to_the_next_captured_size_of_their_kind() -> None:
    model = CostModel(base=1.0, per_token=1.0, row_sizes=(1, 2, 4, 8))
    assert model.predict(StepShape(num_tokens=5, num_decodes=5)) == 9
    assert model.predict(StepShape(num_tokens=8, num_decodes=8)) == 9
    assert model.predict(StepShape(num_tokens=11, num_decodes=11)) == 12
    assert model.predict(StepShape(num_tokens=5, num_decodes=1, num_prefill_tokens=4, num_prefills=1)) == 6
    mixed = replace(model, mixed_sizes=(16, 32))
    for tokens, seconds in ((5, 17), (17, 33), (33, 34)):
        assert mixed.predict(StepShape(num_tokens=tokens, num_prefills=1)) == seconds
    assert mixed.predict(StepShape(num_tokens=5, num_decodes=5)) == 9


def test_tokens_beyond_the_hinge_cost_more() -> None:
    model = CostModel(base=1.0, per_token=1.0, hinge=10, per_token_beyond=2.0)
    assert [model.predict(StepShape(num_tokens=n)) for n in (10, 11, 12)] == [11, 14, 17]
