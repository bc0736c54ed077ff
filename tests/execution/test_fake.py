"""The stub executor reads its history from the pages, as a model reads KV."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.config import PoolSpec
from polybatch.detokenizer import IncrementalDetokenizer
from polybatch.errors import EngineError
from polybatch.execution.fake import ByteTokenizer, FakeExecutor
from polybatch.request import AdapterRef, Request, SamplingParams, Sequence
from polybatch.scheduling.plan import Chunk, LogitRows, PageCopy, StepPlan

POOL = PoolSpec(num_pages=8, page_size=4, page_bytes=32, num_layers=1)


def sequence(tokens: list[int], pages: list[int], adapter: AdapterRef | None = None) -> Sequence:
    seq = Sequence(Request("r", tuple(tokens), SamplingParams(), 8, 0, adapter=adapter))
    seq.pages = pages
    return seq


def run(executor: FakeExecutor, *chunks: Chunk, copies: tuple[PageCopy, ...] = ()) -> torch.Tensor:
    return executor.forward(StepPlan(chunks, copies=copies), {})


def test_logits_depend_on_tokens_and_not_on_pages_or_chunking() -> None:
    executor = FakeExecutor(pool=POOL)
    tokens = [5, 6, 7, 8, 9, 10]
    whole = run(executor, Chunk(sequence(tokens, [0, 1]), 0, 6, LogitRows.ALL))
    seq = sequence(tokens, [5, 3])
    first = run(executor, Chunk(seq, 0, 3, LogitRows.ALL))
    second = run(executor, Chunk(seq, 3, 3, LogitRows.ALL))
    assert torch.equal(whole, torch.cat([first, second]))
    assert whole.shape == (6, 258)
    assert whole.dtype == torch.float32
    other = run(executor, Chunk(sequence([5, 6, 7, 8, 9, 11], [0, 1]), 0, 6, LogitRows.LAST))
    assert not torch.equal(whole[-1], other[0])


def test_a_wrong_page_or_a_missing_copy_changes_the_logits() -> None:
    executor = FakeExecutor(pool=POOL)
    seq = sequence([1, 2, 3, 4, 5], [0, 1])
    right = run(executor, Chunk(seq, 0, 5, LogitRows.LAST))
    wrong = run(executor, Chunk(sequence([1, 2, 3, 4, 5], [2, 1]), 4, 1, LogitRows.LAST))
    copied = run(
        executor,
        Chunk(sequence([1, 2, 3, 4, 5], [3, 1]), 4, 1, LogitRows.LAST),
        copies=(PageCopy(0, 3),),
    )
    assert torch.equal(copied, right)
    assert not torch.equal(wrong, right)


def test_a_chunk_of_an_adapter_that_is_not_resident_is_an_engine_error() -> None:
    seq = sequence([1, 2], [0], AdapterRef("a", "digest", 1))
    with pytest.raises(EngineError, match="not resident"):
        run(FakeExecutor(pool=POOL), Chunk(seq, 0, 2, LogitRows.LAST))


def test_byte_tokenizer_round_trips_and_hides_special_tokens_on_request() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("naïve 🦜")
    assert tokenizer.decode(ids) == "naïve 🦜"
    assert tokenizer.decode([*ids, 256]) == "naïve 🦜"
    assert tokenizer.decode([*ids, 256], skip_special_tokens=False) == "naïve 🦜<eos>"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=20), st.booleans())
def test_streamed_bytes_add_up_to_the_decoded_text(ids: list[int], skip: bool) -> None:
    tokenizer = ByteTokenizer()
    detokenizer = IncrementalDetokenizer(tokenizer, [], skip)
    streamed = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)
