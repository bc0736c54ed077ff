"""RaggedBatch against one token at a time, on random plans; and without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.config import PoolSpec
from polybatch.errors import EngineError
from polybatch.execution.ragged_batch import build
from polybatch.request import AdapterRef, Request, SamplingParams, Sequence
from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan

ADAPTERS = [None, AdapterRef("first", "d1", 1), AdapterRef("second", "d2", 2)]


def pool(page_size):
    return PoolSpec(num_pages=1000, page_size=page_size, page_bytes=64, num_layers=1)


def sequence(tokens, pages, adapter=None):
    seq = Sequence(Request("r", tuple(tokens), SamplingParams(), max_tokens=1, seed=0, adapter=adapter))
    seq.pages = list(pages)
    return seq


chunk_shapes = st.tuples(
    st.integers(0, 30), st.integers(1, 9), st.integers(0, 3), st.sampled_from(LogitRows), st.integers(0, 2)
)


@settings(max_examples=40, deadline=None)
@given(shapes=st.lists(chunk_shapes, max_size=6), page_size=st.sampled_from([1, 4, 16]), rng=st.randoms())
def test_every_token_finds_its_position_page_and_adapter(shapes, page_size, rng):
    pages = list(range(1000))
    rng.shuffle(pages)
    chunks = []
    for start, count, spare, rows, adapter in shapes:
        tokens = [rng.randrange(50) for _ in range(start + count + spare)]
        own = [pages.pop() for _ in range(-(-len(tokens) // page_size))]
        chunks.append(Chunk(sequence(tokens, own, ADAPTERS[adapter]), start, count, rows))
    batch = build(StepPlan(tuple(chunks)), pool(page_size))

    expected_rows, row = [], 0
    owners = {}
    for start, stop, adapter in batch.segments.tolist():
        assert start < stop
        for t in range(start, stop):
            assert t not in owners
            owners[t] = batch.adapters[adapter]
    for s, chunk in enumerate(chunks):
        assert batch.cu_tokens[s] == row
        assert batch.kv_lens[s] == chunk.start + chunk.n_new
        held = -(-int(batch.kv_lens[s]) // page_size)
        assert batch.page_table[s, :held].tolist() == chunk.seq.pages[:held]
        for position in range(chunk.start, chunk.start + chunk.n_new):
            assert batch.token_ids[row] == chunk.seq.tokens[position]
            assert batch.positions[row] == position
            page, offset = divmod(int(batch.slots[row]), page_size)
            assert (page, offset) == (chunk.seq.pages[position // page_size], position % page_size)
            digest = chunk.seq.adapter.digest if chunk.seq.adapter else None
            assert owners.get(row) == digest
            last = position == chunk.start + chunk.n_new - 1
            if chunk.logits is LogitRows.ALL or (chunk.logits is LogitRows.LAST and last):
                expected_rows.append(row)
            row += 1
    assert batch.logit_rows.tolist() == expected_rows
    assert batch.num_tokens == row
    assert batch.num_seqs == len(chunks)


def test_neighbours_with_one_adapter_share_a_segment():
    chunks = [Chunk(sequence([1, 2], [0], ADAPTERS[n]), 0, 2, LogitRows.LAST) for n in (2, 2, 0, 2, 1, 1)]
    batch = build(StepPlan(tuple(chunks)), pool(4))
    assert batch.adapters == ("d2", "d1")
    assert batch.segments.tolist() == [[0, 4, 0], [6, 8, 0], [8, 12, 1]]


def test_array_dtypes_are_those_of_the_kernels():
    batch = build(StepPlan((Chunk(sequence([1], [3]), 0, 1, LogitRows.LAST),)), pool(4))
    for name in ("positions", "cu_tokens", "kv_lens", "page_table", "segments"):
        assert getattr(batch, name).dtype == np.int32
    for name in ("token_ids", "slots", "logit_rows"):
        assert getattr(batch, name).dtype == np.int64


@pytest.mark.parametrize(
    ("start", "count", "pages", "message"),
    [
        (0, 0, [1], "at least one token"),
        (3, 2, [1], "at least one token"),
        (0, 4, [], "needs 1 pages"),
    ],
)
def test_a_chunk_that_its_sequence_cannot_serve_is_refused(start, count, pages, message):
    chunk = Chunk(sequence([1, 2, 3, 4], pages), start, count, LogitRows.NONE)
    with pytest.raises(EngineError, match=message):
        build(StepPlan((chunk,)), pool(4))


def test_batches_are_built_without_torch():
    code = "import sys; sys.modules['torch'] = None; import polybatch.execution.ragged_batch"
    subprocess.run([sys.executable, "-c", code], check=True)
