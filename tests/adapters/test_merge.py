"""Merged weights are the base model's with the adapter's formula worked in."""

from __future__ import annotations

import dataclasses

import helpers
import pytest
import torch
from helpers import HFWeights, merged_model, random_adapter, tiny_model

from polybatch.adapters.merge import MergedWeights
from polybatch.adapters.weights import VocabularyDelta
from polybatch.models.as_transformers import to_transformers


@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen2", "qwen3"])
def test_merged_weights_equal_a_merged_model(name: str) -> None:
    model = tiny_model(name)
    ranks = dict(zip(helpers.MODULES, (0, 3, 5, 1, 2, 7, 4), strict=True))
    adapter = random_adapter(HFWeights(model).spec, ranks, seed=1, layers=[1])
    merged = MergedWeights(HFWeights(model), adapter)
    expected = HFWeights(merged_model(model, adapter))
    for layer in range(expected.spec.num_layers):
        for field in dataclasses.fields(merged.layer(layer)):
            got, want = (getattr(w.layer(layer), field.name) for w in (merged, expected))
            assert got is want is None or torch.allclose(got, want, atol=1e-6), field.name
        for module in helpers.MODULES:
            assert torch.allclose(merged.linear(layer, module), expected.linear(layer, module), atol=1e-6)


def test_gains_scale_the_weight_and_biases_add_to_the_bias() -> None:
    base = HFWeights(tiny_model("llama-tied-biased"))
    adapter = random_adapter(base.spec, {"q_proj": 2, "down_proj": 0}, dense=True)
    merged = MergedWeights(base, adapter)
    expected = HFWeights(merged_model(tiny_model("llama-tied-biased"), adapter))
    for field in ("q", "q_bias", "down", "down_bias"):
        assert torch.allclose(getattr(merged.layer(0), field), getattr(expected.layer(0), field), atol=1e-6)


def test_a_change_of_one_end_of_a_tied_model_leaves_the_other() -> None:
    base = HFWeights(tiny_model("qwen2"))
    left, right = torch.randn(helpers.VOCAB_SIZE, 2), torch.randn(2, 64)
    adapter = random_adapter(base.spec, {})
    head_only = dataclasses.replace(adapter, lm_head=VocabularyDelta(left=left, right=right))
    merged = MergedWeights(base, head_only)
    assert not merged.spec.tie_embeddings
    assert torch.equal(merged.embedding(), base.embedding())
    assert torch.allclose(merged.lm_head(), base.lm_head() + left @ right)
    replaced = MergedWeights(base, dataclasses.replace(adapter, embedding=VocabularyDelta(full=left @ right)))
    assert torch.equal(replaced.embedding(), left @ right)
    assert torch.equal(replaced.lm_head(), base.lm_head())
    assert not to_transformers(replaced).config.tie_word_embeddings
