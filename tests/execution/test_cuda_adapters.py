"""Adapters in a GPU pool's pages, on the CPU: rows where the words say, whatever was loaded before."""

import dataclasses

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


def test_an_adapter_may_move_and_come_back_from_the_host_cache_or_without_it():
    for cache in (0, 1 << 20):
        arena, adapters = pool(host_cache_bytes=cache)
        weights = adapter(1, dense=True)
        adapters.prepare(weights)
        count = adapters.pages_needed(weights)
        for first in (0, 20, 7):
            arena[:] = 0xFF
            pages = tuple(range(first, first + count))
            adapters.load(weights, pages)
            (index,) = adapters.place([weights.digest], {weights.digest: pages})
            for layer in range(SPEC.num_layers):
                read(adapters, arena, torch.float32, index, weights, layer)


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


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_rows_are_written_wherever_they_lie(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 5))
    slots = data.draw(st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=12))
    values = torch.arange(len(slots) * width, dtype=torch.float32).view(-1, width) + 1
    flat = torch.zeros(41 * width)
    cuda_adapters._write(flat, np.array(slots, np.int64) * width, values)
    expected = torch.zeros(41, width)
    expected[slots] = values
    assert torch.equal(flat.view(41, width), expected)
