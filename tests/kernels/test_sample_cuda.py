"""Sampling on the device against the host's sampler; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybatch.errors import EngineError
from polybatch.kernels.sample import arrays, fill, is_device_samplable, sample
from polybatch.kernels.sample.cuda import DeviceSampler, SampleParams
from polybatch.request import Request, SamplingParams, Sequence
from polybatch.sampling.sampler import Sampler
from polybatch.sampling.state import SamplingState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 1e-5
"""Share of a row's mass by which sums in another order may move an edge."""


def make_state(seed: int = 0, **params: Any) -> SamplingState:
    return SamplingState(Sequence(Request("r", (1, 2), SamplingParams(**params), 100, seed)))


def on_device(
    logits: torch.Tensor, states: list[SamplingState], uniform: float | None = None
) -> tuple[list[int], list[int], dict[str, torch.Tensor]]:
    """Tokens, finite flags and parameters of rows, from a sampler with room for two more."""
    rows, vocab = logits.shape
    views = {name: np.full(shape, 7, dtype) for name, (shape, dtype) in arrays(rows + 2).items()}
    may_truncate = fill(views, states, [len(s.seq.tokens) for s in states], vocab)
    if uniform is not None:
        views["uniform"][:] = uniform
    params = {name: torch.from_numpy(view) for name, view in views.items()}
    tokens = torch.full((rows + 2,), -7, dtype=torch.int32, device=DEVICE)
    finite = tokens.clone()
    DeviceSampler(rows + 2, vocab, DEVICE).sample(
        logits.to(DEVICE),
        SampleParams(**{name: x.to(DEVICE) for name, x in params.items()}),
        tokens,
        finite,
        may_truncate=may_truncate,
    )
    assert tokens[rows:].tolist() == finite[rows:].tolist() == [-7, -7]
    return tokens[:rows].tolist(), finite[:rows].tolist(), {name: x[:rows] for name, x in params.items()}


def is_within_rounding(row: torch.Tensor, state: SamplingState, uniform: float, token: int) -> bool:
    """Whether the token's part of the row's distribution holds the number, give or take rounding."""
    p = state.params
    scaled = row.float() / torch.tensor(p.temperature)
    is_cut = bool(p.top_k) or p.top_p < 1 or p.min_p > 0
    order = scaled.argsort(descending=True, stable=True) if is_cut else torch.arange(len(scaled))
    order = order[: p.top_k or None]
    weights = (scaled[order].double() - scaled.max()).exp()
    before = weights.cumsum(0) - weights
    edge = p.top_p * weights.sum() * (1 + ROUNDING)
    weights = weights * (((before < edge) & (weights >= p.min_p * (1 - ROUNDING))) | (before == 0))
    sums = weights.cumsum(0) / weights.sum()
    place = (order == token).nonzero()
    if not len(place) or not weights[place[0, 0]]:
        return False
    at = place[0, 0]
    start = sums[at] - weights[at] / weights.sum()
    return bool(start - ROUNDING <= uniform <= sums[at] + ROUNDING)


def check(logits: torch.Tensor, states: list[SamplingState], uniform: float | None = None) -> list[int]:
    """Assert that the device's tokens are those of the host's sampler and of the reference."""
    tokens, finite, params = on_device(logits, states, uniform)
    assert finite == [1] * len(states)
    others = [sample(logits, **params)[0].tolist()]
    if uniform is None:
        others.append(Sampler(logits.shape[1]).sample(logits.float(), states).tokens)
    for row, state in enumerate(states):
        for other in others:
            assert tokens[row] == other[row] or (
                not state.is_greedy
                and is_within_rounding(logits[row], state, float(params["uniform"][row]), tokens[row])
            )
    return tokens


def random_logits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.9},
    {"top_k": 50},
    {"min_p": 0.05, "temperature": 1.7},
    {"top_p": 0.9999, "temperature": 4.0},
    {"top_k": 5, "top_p": 0.7, "min_p": 0.1},
]


@settings(max_examples=10, deadline=None)
@given(
    vocab=st.sampled_from([2, 97, 128, 129, 300]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 100, 10**6]),
    top_p=st.sampled_from([1e-9, 0.4, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    is_tied=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_row_gives_the_host_samplers_token(
    vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, is_tied: bool, seed: int
) -> None:
    logits = random_logits(1, vocab, seed)
    if is_tied:
        logits = logits.round()
    check(logits, [make_state(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)])


def test_rows_cut_by_candidates_give_the_host_samplers_token() -> None:
    kinds = [KINDS[i] for i in (1, 2, 3, 4)]
    check(random_logits(len(kinds), 9000, 1), [make_state(i, **kind) for i, kind in enumerate(kinds)])


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [5003, 12000, 40009])
def test_every_kind_of_row_gives_the_host_samplers_token_at_real_sizes(vocab: int) -> None:
    states = [make_state(i, **KINDS[i % len(KINDS)]) for i in range(4 * len(KINDS))]
    check(random_logits(len(states), vocab, vocab), states)


def test_a_token_does_not_depend_on_the_batch() -> None:
    kinds = [KINDS[i] for i in (0, 1, 2, 6)]
    logits = random_logits(len(kinds), 300, 3)
    states = [make_state(i, **kind) for i, kind in enumerate(kinds)]
    together = on_device(logits, states)[0]
    backwards = on_device(logits.flip(0), states[::-1])[0]
    assert backwards == together[::-1]
    assert together == [on_device(logits[i : i + 1], [state])[0][0] for i, state in enumerate(states)]


def test_rows_may_be_strided_and_16_bits_wide() -> None:
    logits = random_logits(3, 700, 4).bfloat16()
    check(logits[:, 13:613], [make_state(i, **KINDS[i]) for i in (0, 1, 6)])


@pytest.mark.parametrize(("vocab", "uniform"), [(200, 0.0), (200, 0.5), (9000, 1 - 2**-53)])
def test_equal_logits_are_taken_in_the_order_of_their_ids(vocab: int, uniform: float) -> None:
    # 9,000 equals are more than can be gathered: the passes run over the whole row.
    kinds: list[dict[str, Any]] = [{"top_k": 10}, {"top_p": 0.25}, {"min_p": 1.0}, {}, {"top_k": 1}]
    sizes = [10, vocab // 4, vocab, vocab, 1]
    if vocab > 1000:
        kinds, sizes = kinds[:2], sizes[:2]
    states = [make_state(**kind) for kind in kinds]
    tokens = check(torch.zeros(len(kinds), vocab), states, uniform)
    for token, size in zip(tokens, sizes, strict=True):
        # Weights of the equals are sums of float32 parts: the edge may be off by one.
        assert abs(token - math.floor(uniform * size)) <= 1
    greedy = make_state(temperature=0.0)
    assert on_device(torch.zeros(1, vocab), [greedy])[0] == [0]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_columns_of_minus_infinity_are_never_drawn(uniform: float) -> None:
    logits = torch.full((4, 1000), -torch.inf)
    allowed = [3, 400, 401, 999]
    logits[:, allowed] = torch.tensor([0.5, 1.0, 1.0, -2.0])
    tokens = check(logits, [make_state(**KINDS[i]) for i in (0, 3, 4, 5)], uniform)
    assert set(tokens) <= set(allowed)


def test_negative_and_signed_zero_logits_keep_their_order() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1e-30, -5.0, 1e-30, -0.0]])
    for uniform in (0.2, 0.5, 0.7):
        check(logits, [make_state(top_k=5)], uniform)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[6]])
def test_a_row_that_is_not_finite_is_flagged_and_its_token_stays_in_range(kind: dict[str, Any]) -> None:
    logits = random_logits(4, 300, 6)
    logits[0, 299] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    states = [make_state(i, **kind) for i in range(4)]
    tokens, finite, _ = on_device(logits, states)
    assert finite == [0, 0, 0, 1]
    assert all(0 <= token < 300 for token in tokens)
    assert sorted(Sampler(300).sample(logits, states).errors) == [0, 1, 2]


def test_only_rows_that_need_nothing_but_their_logits_are_sampled_on_the_device() -> None:
    for kind in KINDS:
        assert is_device_samplable(make_state(**kind))
    for kind in (
        {"logprobs": 0}, {"logit_bias": {1: 1.0}}, {"min_tokens": 1}, {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1}, {"frequency_penalty": 0.1},
    ):  # fmt: skip
        assert not is_device_samplable(make_state(**kind))


def test_rows_beyond_the_step_are_filled_as_greedy() -> None:
    views = {name: np.full(shape, 7, dtype) for name, (shape, dtype) in arrays(4).items()}
    assert not fill(views, [make_state(), make_state(temperature=0.0)], [2, 2], 50)
    assert views["temperature"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert fill(views, [make_state(top_k=3)], [2], 50)
    assert views["temperature"].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_logits_of_another_size_are_refused() -> None:
    with pytest.raises(EngineError, match="made for"):
        DeviceSampler(2, 10, DEVICE).sample(
            torch.zeros(3, 10), SampleParams(*(torch.zeros(0),) * 5), torch.zeros(0), torch.zeros(0)
        )
    with pytest.raises(EngineError, match="vocab_size is"):
        DeviceSampler(1, 10**6, DEVICE)
