"""The real small model against transformers: greedy tokens of 32 prompts, 64 each, in float32.

transformers reads the same GGUF file. It is given the engine's tokens and says at every position what it
would have chosen: where no token differs, its own greedy output is the same text; where one does, the
comparison goes on behind the engine's token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from polybatch.engine.equivalence import NEAR_TIE
from polybatch.engine.llm import LLM
from polybatch.request import SamplingParams

QUESTIONS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "spec_bench_even.jsonl"
NUM_PROMPTS, NUM_TOKENS = 32, 64
MAX_NEAR_TIES = 2
"""Of 2,048 tokens; none differed when this was written."""

TEXTS = [
    "The history of the lighthouse begins with",
    "Explain in two sentences why the sky is blue.",
    "def quicksort(items):\n    if len(items) < 2:",
    "Dear Sir or Madam,\n\nI am writing to",
    "1. Flour\n2. Sugar\n3.",
    "Q: What is the capital of Australia?\nA:",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "The mitochondria is the part of the cell that",
    "SELECT name, price FROM products WHERE",
    "To be, or not to be, that is the",
    "My three favourite things about autumn are",
    "The train leaves at 9:40 and arrives at 11:15. The journey takes",
    "In 1969, Neil Armstrong",
    '{"name": "Ada", "born": 1815, "known_for":',
    "Photosynthesis is the process by which plants",
    "Translate to French: The cat sleeps on the sofa.\nFrench:",
    "The opposite of generous is",
    "Ingredients for a simple tomato soup:",
    "Monday, Tuesday, Wednesday,",
    "The main difference between a virus and a bacterium is",
    "Review: The battery died after two days and nobody answered my mails.\nSentiment:",
    "import numpy as np\n\n# Compute the mean of each column\n",
    "If all roses are flowers and some flowers fade quickly, then",
    "The speed of light in a vacuum is about",
    "Haiku about rain:\n",
    "Subject: Meeting moved to Thursday\n\nHi all,",
    "The Great Wall of China was built to",
    "A good night's sleep is important because",
    "x^2 - 5x + 6 = 0 has the solutions",
    "Yesterday I went to the market and bought",
    "The three laws of motion were formulated by",
    "Speaker A: Have you seen my keys?\nSpeaker B:",
]


def questions() -> list[str]:
    """Users' questions where the shared data lie beside the checkout, else the texts above."""
    if not QUESTIONS.is_file():
        return TEXTS
    with QUESTIONS.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(NUM_PROMPTS), lines, strict=False)]
    return [row["turns"][0] for row in rows]


@pytest.fixture(scope="module")
def llm(real_model: Path) -> Iterator[LLM]:
    with LLM(str(real_model), dtype="float32", max_model_len=512, memory="512MiB", threads=1) as llm:
        yield llm


@dataclass(frozen=True)
class Comparison:
    """num_near_ties: tokens that differ where the oracle's best logits all but tie; num_wrong: elsewhere."""

    num_tokens: int
    num_near_ties: int
    num_wrong: int


def compare(llm: LLM, oracle: Any, prompts: list[str]) -> Comparison:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    num_tokens = num_near_ties = num_wrong = 0
    for output in llm.generate(prompts, params):
        tokens = torch.tensor(output.outputs[0].token_ids)
        given = torch.tensor([*output.prompt_token_ids, *tokens[:-1].tolist()])
        with torch.no_grad():
            logits = oracle(input_ids=given[None], logits_to_keep=len(tokens)).logits[0]
        best = logits.topk(2).values
        differs = logits.argmax(dim=-1) != tokens
        is_near = best[:, 0] - best[:, 1] < NEAR_TIE
        num_tokens += len(tokens)
        num_near_ties += int((differs & is_near).sum())
        num_wrong += int((differs & ~is_near).sum())
    return Comparison(num_tokens, num_near_ties, num_wrong)


@pytest.mark.parametrize("num_prompts", [8, pytest.param(NUM_PROMPTS, marks=pytest.mark.slow)])
def test_greedy_tokens_equal_those_of_transformers(num_prompts: int, llm: LLM, real_oracle: Any) -> None:
    found = compare(llm, real_oracle, questions()[:num_prompts])
    assert found.num_tokens == num_prompts * NUM_TOKENS
    assert found.num_wrong == 0
    assert found.num_near_ties <= MAX_NEAR_TIES


def test_the_comparison_notices_a_wrong_weight(llm: LLM, real_oracle: Any) -> None:
    weight = real_oracle.model.layers[20].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.1)
    try:
        assert compare(llm, real_oracle, TEXTS[:3]).num_wrong > 0
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_there_are_as_many_texts_as_prompts() -> None:
    assert len(TEXTS) == len(set(TEXTS)) == NUM_PROMPTS
    assert len(questions()) == NUM_PROMPTS
