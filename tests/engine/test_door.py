"""What is let in as token ids: integers of the vocabulary in a list, and nothing that only looks like it."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.config import PoolSpec, SchedulerConfig
from polybatch.engine.core import EngineCore
from polybatch.engine.door import Door
from polybatch.errors import RequestError
from polybatch.execution.fake import FakeExecutor, fake_spec
from polybatch.request import SamplingParams
from polybatch.scheduling.scheduler import Scheduler

VOCAB = 258


class Special(enum.IntEnum):
    FIRST = 0
    LAST = VOCAB - 1
    BEYOND = VOCAB


def door() -> Door:
    return Door(fake_spec(VOCAB), max_model_len=200)


def refusal(ids: Any) -> str | None:
    """What is wrong with these ids, one by one, or None."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            return f"prompt holds {token!r}; token ids are integers"
    for token in (min(ids), max(ids)):
        if not 0 <= token < VOCAB:
            return f"prompt has token id {token}; the model's vocabulary is 0 to 257"
    return None


GOOD = st.one_of(st.integers(0, VOCAB - 1), st.sampled_from([0, VOCAB - 1, Special.FIRST, Special.LAST]))
ODD = st.one_of(
    st.sampled_from([-1, VOCAB, 2**31 - 1, 2**31, 2**32 + 5, 2**63, 2**64 + 3, -(2**31) - 1, -(2**64)]),
    st.sampled_from(
        [True, False, 1.0, -0.0, float("nan"), None, "1", b"1", (1,), [1], {}, 1j, Special.BEYOND]
    ),
    st.sampled_from([np.int64(3), np.int32(3), np.uint8(3), np.bool_(True), np.float32(2.0), np.array([1])]),
)


@given(
    st.lists(GOOD, min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 19), ODD), max_size=2),
    st.sampled_from([list, tuple, type("Ids", (list,), {}), type("FixedIds", (tuple,), {})]),
)
@settings(max_examples=300, deadline=None)
def test_a_prompt_is_taken_iff_every_token_is_an_integer_of_the_vocabulary(
    good: list[int], odd: list[tuple[int, Any]], kind: type
) -> None:
    tokens: list[Any] = list(good)
    for at, value in odd:
        tokens.insert(at, value)
    expected = refusal(tokens)
    if expected is None:
        found = door().prepare("r", kind(tokens)).prompt_token_ids
        assert found == tuple(tokens)
        assert type(found) is tuple
        assert {type(token) for token in found} == {int}
        return
    with pytest.raises(RequestError) as caught:
        door().prepare("r", kind(tokens))
    assert str(caught.value) == expected
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    "prompt",
    [
        {1, 2},
        frozenset((1, 2)),
        {1: 2},
        range(3),
        np.arange(3),
        bytes(3),
        bytearray(3),
        iter([1, 2]),
        7,
        None,
    ],
)
def test_ids_come_in_a_list_or_tuple(prompt: Any) -> None:
    with pytest.raises(RequestError, match="it must be text or a list of token ids") as caught:
        door().prepare("r", prompt)
    assert caught.value.field == "prompt"


def test_a_request_keeps_its_tokens_whatever_becomes_of_the_callers_list() -> None:
    ids = [1, 2, 3]
    request = door().prepare("r", ids)
    ids[0] = 999
    assert request.prompt_token_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("max_model_len", "pool_tokens", "way_out"),
    [
        (200, 208, r"or raise max_model_len$"),
        (208, 208, r"or raise memory, and max_model_len if it is set$"),
        (fake_spec(VOCAB).max_position, None, r" or shorten the prompt$"),
    ],
    ids=["set by the user", "what memory holds", "the model's own"],
)
def test_a_request_that_is_too_long_is_told_what_set_the_limit(
    max_model_len: int, pool_tokens: int | None, way_out: str
) -> None:
    its = Door(fake_spec(VOCAB), max_model_len, pool_tokens=pool_tokens)
    with pytest.raises(RequestError, match=way_out) as caught:
        its.prepare("r", [1, 2, 3], SamplingParams(max_tokens=max_model_len))
    assert caught.value.field == "max_tokens"
    with pytest.raises(RequestError, match=way_out.replace(" or shorten", ": shorten")) as caught:
        its.prepare("r", [1] * max_model_len)
    assert caught.value.field == "prompt"


def test_an_engine_whose_memory_holds_less_than_the_model_could_take_says_so() -> None:
    pool = PoolSpec(num_pages=4, page_size=16, page_bytes=128, num_layers=1)
    executor = FakeExecutor(pool=pool)
    limits = SchedulerConfig(max_model_len=64)
    core = EngineCore(executor, Scheduler(limits, pool), max_model_len=limits.max_model_len)
    with pytest.raises(RequestError, match="raise memory"):
        core.door.prepare("r", [1] * 64)
