"""A model written back to transformers is the model that it came from."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import TINY_MODELS, HFWeights, hf_logits, random_tokens, tiny_model

from polybatch.errors import ModelError
from polybatch.models.as_transformers import to_transformers


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_family_comes_back_with_the_same_logits(name: str) -> None:
    model = tiny_model(name)
    rebuilt = to_transformers(HFWeights(model))
    assert type(rebuilt) is type(model)
    assert rebuilt.config.tie_word_embeddings == model.config.tie_word_embeddings
    prompt = random_tokens(60, seed=3)
    assert torch.equal(hf_logits(rebuilt, prompt), hf_logits(model, prompt))


class OtherWeights(HFWeights):
    """A model in memory whose spec says something else, as that of a GGUF file would."""

    def __init__(self, name: str, **changes: object) -> None:
        super().__init__(tiny_model(name))
        self.spec = dataclasses.replace(self.spec, **changes)


def test_a_window_under_the_name_llama_is_mistral() -> None:
    rebuilt = to_transformers(OtherWeights("mistral", family="llama"))
    prompt = random_tokens(20)
    assert torch.equal(hf_logits(rebuilt, prompt), hf_logits(tiny_model("mistral"), prompt))


def test_frequency_factors_divide_the_frequencies() -> None:
    weights = OtherWeights("llama")
    plain = to_transformers(weights).model.rotary_emb.inv_freq
    rope = dataclasses.replace(weights.spec.rope, frequency_factors=tuple(range(1, 9)))
    weights.spec = dataclasses.replace(weights.spec, rope=rope)
    divided = to_transformers(weights).model.rotary_emb.inv_freq
    assert torch.equal(divided, plain / torch.arange(1, 9))


def test_what_the_family_of_transformers_lacks_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"no mistral model .*\.bias is one of 14"):
        to_transformers(OtherWeights("llama-tied-biased", family="llama", sliding_window=4))
