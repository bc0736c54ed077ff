"""Rotary frequencies against transformers' definitions."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from polybatch.config import RopeSpec
from polybatch.errors import ModelError
from polybatch.models.family import rope_spec
from polybatch.models.fields import Fields
from polybatch.models.rope import rope_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
VARIANTS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3-default-length": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn-not-truncated": {"rope_type": "yarn", "factor": 32.0, "truncate": False, "beta_fast": 16.0,
                           "original_max_position_embeddings": 4096},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7,
                    "original_max_position_embeddings": 4096},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.75, "beta_slow": 2.0,
                              "original_max_position_embeddings": 16384},
    "yarn-factor-from-lengths": {"rope_type": "yarn", "factor": None,
                                 "original_max_position_embeddings": 4096},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0)])
def test_scaled_frequencies_equal_transformers(name: str, head_dim: int, theta: float) -> None:
    parameters = {"rope_theta": theta, **VARIANTS[name]}
    settings = {"max_position_embeddings": 32768, "hidden_size": head_dim * 2, "num_attention_heads": 2}
    config = LlamaConfig(**settings, rope_parameters=dict(parameters))
    expected, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, device="cpu")
    rope = rope_spec(Fields({**settings, "rope_parameters": parameters}, "config"))
    inv_freq, factor = rope_frequencies(rope, head_dim)
    torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(scaling, abs=1e-12)


def test_default_frequencies_are_powers_of_theta() -> None:
    inv_freq, factor = rope_frequencies(RopeSpec(theta=100.0), 4)
    torch.testing.assert_close(inv_freq, torch.tensor([1.0, 0.1]))
    assert factor == 1.0


def test_frequency_factors_divide_each_frequency() -> None:
    inv_freq, _ = rope_frequencies(RopeSpec(theta=100.0, frequency_factors=(2.0, 5.0)), 4)
    torch.testing.assert_close(inv_freq, torch.tensor([0.5, 0.02]))


def test_frequency_factors_of_another_length_are_refused() -> None:
    with pytest.raises(ModelError, match="3 rope frequency factors"):
        rope_frequencies(RopeSpec(frequency_factors=(1.0, 1.0, 1.0)), 4)


def test_scaling_without_an_original_length_uses_the_models_or_is_refused() -> None:
    rope = RopeSpec(kind="yarn", factor=4.0)
    given = RopeSpec(kind="yarn", factor=4.0, original_max_position=2048)
    assert torch.equal(rope_frequencies(rope, 64, 2048)[0], rope_frequencies(given, 64)[0])
    with pytest.raises(ModelError, match="original_max_position_embeddings"):
        rope_frequencies(rope, 64)
