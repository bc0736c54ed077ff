"""config.json -> ModelSpec: every variant that the field writes, and refusals by name."""

from typing import Any

import pytest
from transformers import MistralConfig, Qwen2Config, Qwen3Config

from polybatch.config import ModelSpec
from polybatch.errors import ModelError
from polybatch.models.fields import Fields
from polybatch.models.hugging_face import read_spec
from polybatch.models.registry import FAMILIES, find_family

BASE = {"model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}  # fmt: skip


def spec_for(generation: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    config = {**BASE, **changes}
    family = find_family(config["model_type"], "config.json")
    return read_spec(
        family, Fields(config, "config.json"), Fields(generation or {}, "generation_config.json")
    )


def test_absent_keys_take_the_family_defaults() -> None:
    spec = spec_for()
    assert (spec.num_kv_heads, spec.head_dim, spec.rms_norm_eps) == (4, 16, 1e-6)
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2,))
    assert spec.rope.theta == 10000.0
    assert not spec.tie_embeddings
    assert spec_for(model_type="qwen3").head_dim == Qwen3Config().head_dim
    assert spec_for(model_type="qwen2").eos_token_ids == ()
    assert spec_for(model_type="mistral").sliding_window == MistralConfig().sliding_window


def test_null_token_ids_mean_none() -> None:
    spec = spec_for(bos_token_id=None, eos_token_id=None)
    assert (spec.bos_token_id, spec.eos_token_ids) == (None, ())


def test_generation_config_decides_the_end_of_sequence() -> None:
    assert spec_for({"eos_token_id": [5, 6]}, eos_token_id=7).eos_token_ids == (5, 6)
    assert spec_for({}, eos_token_id=[7, 8]).eos_token_ids == (7, 8)


def test_biases_follow_the_family() -> None:
    llama = spec_for(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = spec_for(model_type="qwen2")
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = spec_for(model_type="qwen3", attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (True, True, True)


def test_both_spellings_of_rope_scaling_mean_the_same() -> None:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 128}
    old = spec_for(rope_theta=5e5, rope_scaling={"type": "yarn", **scaling})
    new = spec_for(rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **scaling})
    assert old.rope == new.rope
    assert (old.rope.kind, old.rope.theta, old.rope.factor) == ("yarn", 5e5, 4.0)
    assert spec_for(rope_scaling=None, rope_theta=5e5).rope.theta == 5e5
    assert spec_for(rope_scaling={"type": "linear", "factor": 2}).rope.factor == 2.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ],
)  # fmt: skip
def test_qwen_windows_equal_transformers(changes: dict[str, Any]) -> None:
    theirs = Qwen2Config(**{**{k: v for k, v in BASE.items() if k != "model_type"}, **changes})
    spec = spec_for(model_type="qwen2", **changes)
    for layer, kind in enumerate(theirs.layer_types):
        assert spec.window(layer) == (theirs.sliding_window if kind == "sliding_attention" else None)


def test_mistral_window_applies_to_every_layer_unless_null() -> None:
    spec = spec_for(model_type="mistral", sliding_window=9)
    assert [spec.window(layer) for layer in range(3)] == [9, 9, 9]
    assert spec_for(model_type="mistral", sliding_window=None).window(0) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 66}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "key-value heads"),
    ],
)
def test_unsupported_and_malformed_settings_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        spec_for(**changes)


def test_an_unknown_model_type_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(ModelError, match="mamba") as caught:
        find_family("mamba", "config.json")
    assert all(name in str(caught.value) for name in FAMILIES)
