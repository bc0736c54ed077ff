"""The sampler against its naive self, against transformers, and against every batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_helpers import make_state, naive_distribution, naive_edit, random_logits

from polybatch.sampling.sampler import Sampler
from polybatch.sampling.state import SamplingState

params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([0, 1, 5, 100]),
        "top_p": st.sampled_from([0.1, 0.7, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.4]),
        "repetition_penalty": st.sampled_from([1.0, 0.8, 1.4]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.5, 0.7]),
        "logit_bias": st.dictionaries(st.integers(0, 39), st.floats(-5, 5), max_size=3),
        "min_tokens": st.sampled_from([0, 3]),
        "logprobs": st.sampled_from([None, 0, 4]),
        "seed": st.integers(0, 2**40),
    }
)
tokens = st.lists(st.integers(0, 39), min_size=1, max_size=12)


def build(p: dict[str, Any], prompt: list[int], output: list[int]) -> SamplingState:
    p = dict(p)
    return make_state(prompt, output, stop_ids=frozenset({0, 7}), **(p | {"seed": p["seed"]}))


@settings(max_examples=150, deadline=None)
@given(params, tokens, tokens, st.integers(0, 1000))
def test_a_drawn_token_is_one_that_the_naive_rules_allow(p: Any, prompt: Any, output: Any, seed: int) -> None:
    logits = random_logits(1, 40, seed)
    state = build(p, prompt, output)
    token = Sampler(40).sample(logits, [state]).tokens[0]
    assert token in naive_distribution(logits[0].double().tolist(), state)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(params, tokens, tokens), min_size=2, max_size=9), st.randoms())
def test_a_token_and_its_logprobs_do_not_depend_on_the_batch(rows: Any, rng: Any) -> None:
    logits = random_logits(len(rows), 200, len(rows))
    sampler = Sampler(200)
    alone = [sampler.sample(logits[i : i + 1], [build(*row)]) for i, row in enumerate(rows)]
    order = list(range(len(rows)))
    rng.shuffle(order)
    together = sampler.sample(logits[order], [build(*rows[i]) for i in order])
    for place, i in enumerate(order):
        assert together.tokens[place] == alone[i].tokens[0]
        assert together.logprobs.get(place) == alone[i].logprobs.get(0)


@pytest.mark.parametrize("vocab", [49152, 5003])
def test_batch_invariance_holds_at_real_vocabulary_sizes(vocab: int) -> None:
    logits = random_logits(24, vocab, 1)
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05, "temperature": 1.7},
        {"top_p": 0.999, "temperature": 3.0}, {"logprobs": 5}, {"repetition_penalty": 1.2},
    ]  # fmt: skip
    states = [make_state([1, 2, 3], seed=i, **kinds[i % len(kinds)]) for i in range(24)]
    sampler = Sampler(vocab)
    together = sampler.sample(logits, states)
    for i, state in enumerate(states):
        alone = sampler.sample(logits[i : i + 1].clone(), [state])
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs.get(0) == together.logprobs.get(i)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.05, "temperature": 1.5},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    ],
)
def test_draws_follow_the_naive_distribution(kind: dict[str, Any]) -> None:
    draws = 4000
    row = random_logits(1, 12, 5, scale=1.0)
    states = [make_state([3, 3, 4], [5, 5, 6], seed=s, **kind) for s in range(draws)]
    found = Sampler(12).sample(row.expand(draws, -1).contiguous(), states).tokens
    expected = naive_distribution(row[0].double().tolist(), states[0])
    counts = np.bincount(found, minlength=12)
    chi2 = sum((counts[t] - draws * q) ** 2 / (draws * q) for t, q in expected.items())
    assert set(np.flatnonzero(counts)) <= set(expected)
    assert chi2 < 2 * len(expected) + 20  # the seeds are fixed: this cannot flake


def test_a_nucleus_wider_than_the_first_candidates_keeps_its_tail() -> None:
    # Flat logits over 3,000 tokens: top-p 0.9 keeps 2,700, far beyond what is looked at first.
    logits = torch.zeros(3000, 3000)
    states = [make_state(seed=s, top_p=0.9) for s in range(3000)]
    found = Sampler(3000).sample(logits, states).tokens
    # One more may slip in: the edge is subject to rounding.
    assert max(found) <= 2700
    assert max(found) > 2600
    assert len(set(found)) > 1500


def test_plain_greedy_rows_take_the_first_best_logit() -> None:
    logits = random_logits(6, 333, 2).round()
    states = [make_state(temperature=0.0) for _ in range(6)]
    sampled = Sampler(333).sample(logits, states)
    assert sampled.tokens == logits.numpy().argmax(axis=1).tolist()
    assert not sampled.logprobs
    assert not sampled.errors


def test_the_raw_logits_are_left_as_they_were() -> None:
    logits = random_logits(3, 50, 2)
    before = logits.clone()
    states = [make_state([1], [2], top_k=5, frequency_penalty=1.0, logit_bias={3: 5.0}) for _ in range(3)]
    Sampler(50).sample(logits, states)
    assert torch.equal(logits, before)


def test_counts_kept_step_by_step_equal_counts_made_at_once() -> None:
    kind = {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4}
    sampler, grown, rng = Sampler(90), make_state([1, 2, 3], **kind), np.random.default_rng(0)
    for step in range(150):
        logits = random_logits(1, 90, step)
        fresh = make_state([1, 2, 3], grown.seq.output_token_ids, **kind)
        assert sampler.sample(logits, [grown]).tokens == sampler.sample(logits, [fresh]).tokens
        grown.seq.tokens.append(int(rng.integers(90)))


def test_min_tokens_masks_the_stop_ids_and_only_until_reached() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 5] = 9.0
    kind = {"temperature": 0.0, "min_tokens": 2, "stop_ids": frozenset({5})}
    assert Sampler(8).sample(logits, [make_state([1], [2], **kind)]).tokens != [5]
    assert Sampler(8).sample(logits, [make_state([1], [2, 3], **kind)]).tokens == [5]


def test_logprobs_are_those_of_the_raw_logits_with_rank() -> None:
    logits = random_logits(1, 300, 8)
    state = make_state([1], [2], temperature=0.0, logprobs=3, logit_bias={17: 100.0}, frequency_penalty=1.0)
    entry = Sampler(300).sample(logits, [state]).logprobs[0]
    expected = logits.log_softmax(1)[0]
    order = expected.argsort(descending=True)
    assert entry.token == 17
    assert entry.logprob == pytest.approx(expected[17].item(), abs=1e-5)
    assert order[entry.rank - 1] == 17
    assert list(entry.top_ids) == order[:3].tolist()
    assert list(entry.top_logprobs) == pytest.approx(expected[order[:3]].tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_finite_logits_is_an_error_of_that_row_alone(bad: float) -> None:
    logits = random_logits(3, 20, 3)
    right = Sampler(20).sample(logits, [make_state(seed=i) for i in range(3)])
    logits[1, 4] = bad
    sampled = Sampler(20).sample(logits, [make_state(seed=i) for i in range(3)])
    assert list(sampled.errors) == [1]
    assert "not finite" in sampled.errors[1]
    assert [sampled.tokens[0], sampled.tokens[2]] == [right.tokens[0], right.tokens[2]]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0.4, 1.0, 1.8]),
    st.sampled_from([0, 3, 11]),
    st.sampled_from([0.35, 0.9, 1.0]),
    st.sampled_from([0.0, 0.15]),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 10_000),
)
def test_allowed_tokens_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seed: int
) -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    row = random_logits(1, 40, seed)
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if penalty != 1.0:
        processors.insert(0, RepetitionPenaltyLogitsProcessor(penalty))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    theirs = processors(torch.tensor([[1, 2, 3, 3]]), row.clone()).softmax(1)[0]
    kind = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    state = make_state([1, 2], [3, 3], repetition_penalty=penalty, **kind)
    naive = naive_distribution(row[0].double().tolist(), state)
    ours = torch.tensor([naive.get(t, 0.0) for t in range(40)])
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    states = [make_state([1, 2], [3, 3], repetition_penalty=penalty, seed=s, **kind) for s in range(32)]
    drawn = Sampler(40).sample(row.expand(32, -1).contiguous(), states).tokens
    assert (theirs[drawn] > 0).all()


def test_naive_edit_penalises_prompt_only_by_repetition() -> None:
    state = make_state([4], [5], repetition_penalty=2.0, presence_penalty=1.0)
    assert naive_edit([1.0] * 6, state)[4:] == [0.5, -0.5]
