"""The engine with the real small model through the real executors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from polybatch.engine.llm import LLM
from polybatch.request import FinishReason, SamplingParams

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [
    "The sky is blue because",
    "Once upon a time",
    "1, 2, 3, 4,",
    "def fibonacci(n):",
    "The three primary colours are red, yellow and",
    "Water boils at a temperature of one hundred degrees, and freezes at",
    "Roses are red, violets are",
]


@pytest.fixture(scope="module", params=["cpu", pytest.param("eager", marks=pytest.mark.slow)])
def llm(request: pytest.FixtureRequest, real_model: Path) -> Iterator[LLM]:
    # Eight pages: enough for one long sequence, too few for all prompts at once.
    with LLM(
        str(real_model), dtype="float32", executor=request.param, max_model_len=96, memory=8 * 737_280,
        max_num_batched_tokens=48, max_num_seqs=8, threads=1,
    ) as llm:  # fmt: skip
        yield llm


def test_the_model_answers_a_chat_and_stops(llm: LLM) -> None:
    completion = llm.chat(CAPITAL, SamplingParams(temperature=0, max_tokens=20))[0].outputs[0]
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason is FinishReason.STOP
    assert completion.token_ids[-1] in llm.spec.eos_token_ids


def test_greedy_tokens_are_the_same_alone_and_in_a_batch_that_preempts(llm: LLM) -> None:
    before = llm.stats().scheduler.num_preemptions
    together = llm.generate(PROMPTS, GREEDY)
    assert llm.stats().scheduler.num_preemptions > before
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == output.outputs[0].token_ids


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_low_precision_logprobs_are_the_same_bits_alone_and_in_a_mixed_batch(
    real_model: Path, quantization: str | None
) -> None:
    names = ("sql", "pirate")
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
    choices = [None, "sql", "pirate", None, "pirate", "sql", None]
    with LLM(
        str(real_model), {name: EXAMPLES / name for name in names}, quantization=quantization,
        max_model_len=96, memory=20 * 368_640, max_num_batched_tokens=24, max_num_seqs=6, threads=1,
    ) as llm:  # fmt: skip
        together = llm.generate(PROMPTS, params, choices)
        for prompt, choice, output in zip(PROMPTS, choices, together, strict=True):
            assert llm.generate(prompt, params, choice)[0].outputs == output.outputs


def test_output_logprobs_equal_those_of_the_same_tokens_as_a_prompt(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=10, logprobs=0, ignore_eos=True)
    output = llm.generate(PROMPTS[1], params)[0]
    completion = output.outputs[0]
    whole = output.prompt_token_ids + completion.token_ids
    scored = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    assert completion.logprobs is not None
    assert scored is not None
    for position, entry in enumerate(completion.logprobs, len(output.prompt_token_ids)):
        token = whole[position]
        at_position = scored[position]
        assert at_position is not None
        assert at_position[token].logprob == pytest.approx(entry[token].logprob, abs=1e-3)
        assert at_position[token].decoded_token == entry[token].decoded_token


def test_a_seeded_sample_repeats_in_any_company(llm: LLM) -> None:
    params = [SamplingParams(seed=i, max_tokens=10, top_p=0.9, n=2) for i in range(len(PROMPTS))]
    together = llm.generate(PROMPTS, params)
    assert llm.generate(PROMPTS[4], params[4])[0].outputs == together[4].outputs
    assert together[4].outputs[0].token_ids != together[4].outputs[1].token_ids


def test_streamed_text_ends_before_a_stop_string(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, stop=[" 7"])
    texts = [output.outputs[0].text for output in llm.stream(PROMPTS[2], params)]
    assert texts[-1] == " 5, 6,"
    assert all(texts[-1].startswith(text) for text in texts)


def test_a_second_look_at_a_prompt_comes_from_the_cache(llm: LLM) -> None:
    prompt = " ".join(PROMPTS)
    first = llm.generate(prompt, GREEDY)[0]
    second = llm.generate(prompt, GREEDY)[0]
    assert second.num_cached_tokens >= len(first.prompt_token_ids) // 16 * 16 - 16
    assert second.outputs == first.outputs


def test_a_planned_job_has_the_same_bits_as_rows_alone(real_model: Path) -> None:
    prefixes = ["A long time ago in a village far from here there lived", "The rules of the game are simple:"]
    prompts = [
        f"{prefixes[i % 2]} {word}" for i, word in enumerate(["one", "two", "three", "four", "five", "six"])
    ]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    found = []
    for policy in ("prefix_groups", "fcfs"):
        with LLM(
            str(real_model), dtype="float32", max_model_len=96, memory=12 * 737_280, max_num_seqs=4,
            threads=1, policy=policy,
        ) as llm:  # fmt: skip
            outputs = llm.generate(prompts, params)
            found.append([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs])
    assert found[0] == found[1]
