"""Adapters packed for loads: the same values in few runs, and nothing copied that lies well already."""

import gc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.adapters import pack as packing
from polybatch.adapters.pack import locate, pack, stored
from polybatch.adapters.weights import AdapterWeights, ModuleDelta

WIDTHS = {"q_proj": (24, 16), "down_proj": (7, 40)}


def adapter(ranks, seed=0, dtype=torch.float32, dense=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    layers = []
    for rank in ranks:
        layer = {}
        for module, (out, in_) in WIDTHS.items():
            vectors = (draw(out), draw(out)) if dense else ()
            layer[module] = ModuleDelta(draw(rank, in_), draw(rank, out), *vectors)
        layers.append(layer)
    return AdapterWeights(f"digest-{seed}", tuple(layers))


def bytes_at(runs, start, count):
    index = int(np.searchsorted(runs.run_starts, start, side="right")) - 1
    low = start - int(runs.run_starts[index])
    return runs.runs[index][low : low + count]


def assert_located(runs, weights):
    tensors = [x for x in stored(weights) if x.numel()]
    for start, tensor in zip(runs.starts.tolist(), tensors, strict=True):
        held = bytes_at(runs, start, tensor.nbytes)
        assert torch.equal(held, tensor.reshape(-1).view(torch.uint8))


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    dense=st.booleans(),
)
def test_a_packed_adapter_has_the_same_values_in_few_runs(ranks, dtype, dense):
    weights = adapter(ranks, dense=dense)
    packed = pack(weights, dtype, pin=False)
    assert packed.digest == weights.digest
    for before, after in zip(stored(weights), stored(packed), strict=True):
        assert torch.equal(before.to(dtype), after)
    runs = locate(packed, dtype)
    assert runs.is_compact
    assert_located(runs, packed)
    assert pack(packed, dtype, pin=False) is packed


@settings(max_examples=25, deadline=None)
@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4), values=st.integers(1000, 4000))
def test_windows_of_one_buffer_are_found_as_they_lie_even_where_they_overlap(ranks, values):
    buffer, at = torch.randn(values), 0
    layers = []
    for rank in ranks:
        layer = {}
        for module, (out, in_) in WIDTHS.items():
            parts = []
            for width in (in_, out):
                at = 0 if at + rank * width > values else at
                parts.append(buffer[at : at + rank * width].view(rank, width))
                at += -(-rank * width // 16) * 16
            layer[module] = ModuleDelta(*parts)
        layers.append(layer)
    weights = AdapterWeights("windows", tuple(layers))
    runs = locate(weights, torch.float32)
    assert runs.num_bytes <= buffer.nbytes
    assert len(runs.runs) <= 2
    assert_located(runs, weights)
    assert pack(weights, torch.float32, pin=False) is weights


@pytest.mark.parametrize("change", ["dtype", "stride"])
def test_tensors_that_cannot_be_copied_as_they_lie_are_not_located(change):
    weights = adapter([3])
    delta = weights.layers[0]["q_proj"]
    other = delta.a.bfloat16() if change == "dtype" else torch.randn(16, 3).T
    weights.layers[0]["q_proj"] = ModuleDelta(other, delta.b)
    assert locate(weights, torch.float32) is None
    assert torch.equal(pack(weights, torch.float32, pin=False).layers[0]["q_proj"].a, other.float())


@pytest.mark.parametrize("rank", [1, 8, 16, 30, 64])
def test_pinned_memory_which_comes_in_powers_of_two_is_hardly_wasted(rank, monkeypatch):
    allocated = []

    def empty(count, **options):
        allocated.append(count)
        return torch.zeros(1, dtype=torch.uint8).expand(count)

    monkeypatch.setattr(packing.torch, "empty", empty)
    widths = [4096, 4096, 4096, 1024, 4096, 1024, 4096, 4096, 4096, 14336, 4096, 14336, 14336, 4096]
    sizes = [2 * rank * width for width in widths] * 32
    slabs = packing._Slabs(sum(sizes), pin=True)
    for size in sizes:
        assert len(slabs.take(size)) == size
    rounded = sum(1 << (count - 1).bit_length() for count in allocated)
    assert rounded < 1.1 * sum(sizes) + packing.MIN_SLAB_BYTES
    assert len(allocated) <= 10


def test_where_nothing_can_be_pinned_memory_stays_pageable_and_it_is_said(monkeypatch, caplog):
    real = torch.empty

    def empty(*shape, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("out of pinned memory")
        return real(*shape, **options)

    monkeypatch.setattr(packing.torch, "empty", empty)
    weights = adapter([2, 3])
    packed = pack(weights, torch.bfloat16, pin=True)
    assert "cannot be pinned" in caplog.text
    assert len(locate(packed, torch.bfloat16).runs) == 1
    mapped = pack(packed, torch.bfloat16, pin=True)
    assert mapped is packed


def test_runs_keep_their_memory_and_weights_can_be_watched():
    packed = pack(adapter([2]), torch.float32, pin=False)
    runs, values = locate(packed, torch.float32), next(stored(packed)).clone()
    watch = weakref.ref(packed)
    del packed
    gc.collect()
    assert watch() is None
    assert torch.equal(bytes_at(runs, int(runs.starts[0]), values.nbytes), values.view(-1).view(torch.uint8))
