"""Mixtures in a batch with others: the answers of a model with the sum merged into its weights."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from gate_helpers import RECIPES, save_adapter, tiny_config
from helpers import random_tokens, tiny_model
from peft import PeftModel

from polybatch.engine.llm import LLM
from polybatch.errors import RequestError
from polybatch.mixture import Mixture
from polybatch.request import SamplingParams

SCALES = [("small", 0.7), ("rslora", -0.3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtures")
    model = tiny_model("llama")
    model.save_pretrained(path / "model")
    for seed, name in enumerate(("small", "rslora", "dora")):
        save_adapter(model, path / name, RECIPES[name], seed)
    return path


@pytest.fixture(params=["cpu", "eager"])
def llm(request: pytest.FixtureRequest, folder: Path):
    adapters = {name: folder / name for name in ("small", "rslora", "dora")}
    config = dataclasses.asdict(tiny_config(executor=request.param))
    with LLM(str(folder / "model"), adapters, **config) as found:
        yield found


def test_a_mixture_answers_as_pefts_sum_beside_other_rows(llm: LLM, folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)
    prompt = random_tokens(20, seed=3)
    choices = [None, "small", SCALES, "rslora", Mixture(SCALES[::-1]), [("small", 0.5)], "dora"]
    outputs = llm.generate([prompt] * len(choices), params, choices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_model("llama"), str(folder / "small"), adapter_name="small")
        model.load_adapter(str(folder / "rslora"), adapter_name="rslora")
        model.add_weighted_adapter(["small", "rslora"], [0.7, -0.3], "sum", combination_type="cat")
        model.add_weighted_adapter(["small"], [0.5], "scaled", combination_type="cat")
    for index, name in ((1, "small"), (2, "sum"), (3, "rslora"), (4, "sum"), (5, "scaled")):
        model.set_adapter(name)
        answer = outputs[index].outputs[0]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        assert expected.argmax(-1).tolist() == answer.token_ids
        assert answer.logprobs is not None
        for row, token, found in zip(expected, answer.token_ids, answer.logprobs, strict=True):
            assert found[token].logprob == pytest.approx(row[token].item(), abs=2e-4)
    tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert len(set(tokens)) == len(tokens) - 1, "the two spellings of one mixture are the only equals"
    assert outputs[2].adapter == "small*0.7+rslora*-0.3"
    # Equal mixtures share pages: base, three adapters alone, one sum, one half.
    assert llm.stats().scheduler.num_adapter_loads == 5


def test_one_mixture_serves_all_prompts(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [random_tokens(5, seed=seed) for seed in range(2)]
    both = llm.generate(prompts, params, SCALES)
    alone = [llm.generate(prompt, params, Mixture(SCALES))[0] for prompt in prompts]
    assert [o.outputs[0].token_ids for o in both] == [o.outputs[0].token_ids for o in alone]


def test_what_cannot_be_mixed_is_refused_before_anything_runs(llm: LLM) -> None:
    steps = llm.stats().times.num_steps
    with pytest.raises(RequestError, match="DoRA"):
        llm.generate([[1, 2], [3]], SamplingParams(max_tokens=2), ["small", [("dora", 0.5)]])
    with pytest.raises(RequestError, match="unknown"):
        llm.generate([1, 2], SamplingParams(max_tokens=2), [("none", 0.5)])
    assert llm.stats().times.num_steps == steps
    assert not llm.core.has_work()
