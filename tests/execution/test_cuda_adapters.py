"""Adapters in a GPU pool's pages, on the CPU: rows where the words say, whatever was loaded before."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.adapters.weights import AdapterWeights, ModuleDelta
from polybatch.config import ModelSpec, RopeSpec
from polybatch.errors import EngineError
from polybatch.execution import cuda_adapters
from polybatch.execution.cuda_adapters import CudaAdapters
from polybatch.kernels.lora import work
from polybatch.kernels.lora.work import A_WORD, ABSENT, GROUPS, MODULE, MODULE_FIELDS, RANK, STRIDE

SPEC = ModelSpec(
    family="llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=16, max_position=64, rms_norm_eps=1e-5, rope=RopeSpec(theta=1e4),
)  # fmt: skip
PAGE_BYTES, NUM_PAGES = 512, 64


def adapter(seed, rank=3, uniform=True, dense=False):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for index in range(SPEC.num_layers):
        deltas = {}
        for i, (module, (out, in_)) in enumerate(SPEC.linear_shapes.items()):
            if not uniform and (index + i) % 3 == 0:
                continue
            r = rank if uniform else (rank * (index + i)) % 5
            a, b = torch.randn(r, in_, generator=generator), torch.randn(r, out, generator=generator)
            gain = torch.randn(out, generator=generator) if dense else None
            bias = torch.randn(out, generator=generator) if dense and i % 2 else None
            deltas[module] = ModuleDelta(a, b, gain, bias)
        layers.append(deltas)
    return AdapterWeights(f"digest-{seed}", tuple(layers))


def pool(dtype=torch.float32, **kwargs):
    arena = torch.full((SPEC.num_layers, NUM_PAGES, PAGE_BYTES), 0xFF, dtype=torch.uint8)
    return arena, CudaAdapters(SPEC, arena, dtype, **kwargs)


def read(adapters, arena, dtype, index, weights, layer):
    """Check every row of one layer against the host's weights, through words and template."""
    memory, template = arena[layer].view(dtype).view(-1), adapters.templates[index]
    unit = 64 // dtype.itemsize

    def row(word, width):
        start = int(adapters.words[word])
        return None if start == ABSENT else memory[start * unit : start * unit + width]

    for group, modules in enumerate(GROUPS):
        record = template[group]
        shift = layer * record[STRIDE]
        assert record[RANK] == sum(
            max((deltas[m].rank for deltas in weights.layers if m in deltas), default=0) for m in modules
        )
        for slot, module in enumerate(modules):
            b_word, rank, first = record[MODULE + MODULE_FIELDS * slot :][:MODULE_FIELDS]
            delta = weights.layers[layer].get(module)
            if b_word == ABSENT:
                assert delta is None or (delta.rank == 0 and delta.gain is None and delta.bias is None)
                continue
            out, in_ = SPEC.linear_shapes[module]
            for r in range(rank):
                a, b = row(record[A_WORD] + shift + first + r, in_), row(b_word + shift + 2 + r, out)
                if delta is None or r >= delta.rank:
                    assert a is None
                    assert b is None
                else:
                    assert torch.equal(a, delta.a[r].to(dtype))
                    assert torch.equal(b, delta.b[r].to(dtype))
            for word, values in enumerate((delta and delta.gain, delta and delta.bias)):
                held = row(b_word + shift + word, out)
                assert (held is None) == (values is None)
                assert values is None or torch.equal(held, values.to(dtype))


@settings(max_examples=10, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_every_row_lies_where_the_words_say_in_every_layer(kinds, dtype, seed):
    arena, adapters = pool(dtype)
    free = np.random.default_rng(seed).permutation(NUM_PAGES).tolist()
    held = [adapter(i, *kind) for i, kind in enumerate(kinds)]
    resident = {}
    for weights in held:
        resident[weights.digest] = tuple(free.pop() for _ in range(adapters.pages_needed(weights)))
        adapters.load(weights, resident[weights.digest])
    places = adapters.place([weights.digest for weights in held], resident)
    for index, weights in zip(places, held, strict=True):
        assert adapters.index_of(weights.digest) == index
        for layer in range(SPEC.num_layers):
            read(adapters, arena, dtype, index, weights, layer)


@pytest.mark.parametrize("staging_bytes", [0, 4096, 64 << 20])
def test_an_adapter_may_move_and_come_back_through_any_staging(staging_bytes):
    arena, adapters = pool(staging_bytes=staging_bytes)
    weights = adapter(1, dense=True)
    count = adapters.pages_needed(weights)
    for first in (0, 20, 7):
        arena[:] = 0xFF
        pages = tuple(range(first, first + count))
        adapters.load(weights, pages)
        (index,) = adapters.place([weights.digest], {weights.digest: pages})
        for layer in range(SPEC.num_layers):
            read(adapters, arena, torch.float32, index, weights, layer)


@settings(max_examples=10, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 6), min_size=SPEC.num_layers, max_size=SPEC.num_layers),
    staging_bytes=st.sampled_from([0, 2048, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    is_packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_or_not_all_rows_of_any_ranks_pass_staging(ranks, staging_bytes, dtype, is_packed, seed):
    arena, adapters = pool(dtype, staging_bytes=staging_bytes)
    shapes = SPEC.linear_shapes.items()
    weights = AdapterWeights(
        "drawn",
        tuple({m: ModuleDelta(torch.randn(r, i), torch.randn(r, o)) for m, (o, i) in shapes} for r in ranks),
    )
    kept = adapters.pack(weights) if is_packed else weights
    order = np.random.default_rng(seed).permutation(NUM_PAGES)
    pages = tuple(order[: adapters.pages_needed(kept)].tolist())
    adapters.load(kept, pages)
    (index,) = adapters.place(["drawn"], {"drawn": pages})
    for layer in range(SPEC.num_layers):
        read(adapters, arena, dtype, index, weights, layer)
    free = arena[:, order[len(pages) :]]
    assert (free == 0xFF).all()


def test_host_memory_is_held_no_longer_than_the_weights():
    _, adapters = pool(torch.bfloat16)
    weights = adapter(1)
    pages = tuple(range(adapters.pages_needed(weights)))
    adapters.load(weights, pages)
    known = adapters._adapters[weights.digest]
    held = weakref.ref(known.source.plan)
    assert held() is not None
    same = adapter(1)
    adapters.load(same, pages)
    del weights
    assert known.source is not None
    del same
    assert known.source is None
    assert held() is None


def test_adapters_of_equal_ranks_share_their_tables():
    _, adapters = pool()
    held = [adapters.pack(adapter(seed, dense=True)) for seed in range(3)]
    sources = [adapters._adapters[weights.digest].source for weights in held]
    assert len({id(source.plan) for source in sources}) == 1
    assert len({run.data_ptr() for source in sources for run, _ in source.copies[0]}) == 3


def test_full_words_start_afresh_with_the_adapters_of_the_step(monkeypatch):
    monkeypatch.setattr(cuda_adapters, "WORDS_PER_PAGE", 8)
    arena, adapters = pool()
    held = [adapter(seed, uniform=False) for seed in range(8)]
    for weights in held:
        pages = tuple(range(adapters.pages_needed(weights)))
        adapters.load(weights, pages)
        (index,) = adapters.place([weights.digest], {weights.digest: pages})
        for layer in range(SPEC.num_layers):
            read(adapters, arena, torch.float32, index, weights, layer)


def test_more_words_than_pages_have_room_for_cost_pages(monkeypatch):
    _, adapters = pool()
    few = adapters.pages_needed(adapter(1))
    monkeypatch.setattr(cuda_adapters, "WORDS_PER_PAGE", 1)
    assert adapters.pages_needed(adapter(1)) > few


def test_an_adapter_of_the_vocabulary_alone_takes_no_pages_and_no_tiles():
    _, adapters = pool()
    weights = AdapterWeights("vocabulary", tuple({} for _ in range(SPEC.num_layers)))
    assert adapters.pages_needed(weights) == 0
    adapters.load(weights, ())
    (index,) = adapters.place(["vocabulary"], {})
    views = {
        name: np.zeros(shape, kind) for name, (shape, kind) in work.arrays(work.LoraLimits(8, 2)).items()
    }
    shapes = work.group_shapes(SPEC.linear_shapes)
    plan = work.fill(
        views, np.array([(0, 5, index)]), adapters.templates, shapes, 1000, num_rows=5, wide=False
    )
    assert plan == work.GRAPH_PLAN
    assert not views["lora_bounds"][0].any()


def test_using_an_adapter_that_is_not_where_the_plan_says_is_an_error():
    _, adapters = pool()
    weights = adapter(1)
    pages = tuple(range(adapters.pages_needed(weights)))
    with pytest.raises(EngineError, match="takes"):
        adapters.load(weights, pages[:-1])
    with pytest.raises(EngineError, match="not resident"):
        adapters.place([weights.digest], {weights.digest: pages})
    adapters.load(weights, pages)
    with pytest.raises(EngineError, match="not resident"):
        adapters.place([weights.digest], {weights.digest: pages[::-1]})


def test_a_forgotten_adapter_leaves_its_index_to_another():
    _, adapters = pool()
    first, second = adapter(1), adapter(2)
    pages = tuple(range(adapters.pages_needed(first)))
    adapters.load(first, pages)
    index = adapters.index_of(first.digest)
    adapters.forget(first.digest)
    adapters.forget(first.digest)
    assert adapters.index_of(first.digest) is None
    adapters.load(dataclasses.replace(second), pages)
    assert adapters.index_of(second.digest) == index
