"""Models in GGUF files: spec and tensors are those of the checkpoint that was converted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_helpers import interleave, write_gguf
from helpers import tiny_model

from polybatch.errors import ModelError
from polybatch.models.checkpoint import CheckpointWeights, layer_shapes
from polybatch.models.family import LAYER_TENSORS
from polybatch.models.gguf_file import GgufFile
from polybatch.models.gguf_model import half_split, open_gguf
from polybatch.models.hugging_face import open_directory


def opened(path: Path) -> CheckpointWeights:
    return open_gguf(GgufFile(path))


@pytest.mark.parametrize("name", ["llama", "llama-tied-biased", "mistral", "qwen2", "qwen3"])
def test_a_converted_model_has_the_tensors_and_spec_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    theirs, ours = open_directory(tmp_path), opened(write_gguf(tmp_path / "m.gguf", model))
    assert torch.equal(ours.embedding(), theirs.embedding())
    assert torch.equal(ours.lm_head(), theirs.lm_head())
    assert torch.equal(ours.final_norm(), theirs.final_norm())
    for index in range(theirs.spec.num_layers):
        for field in layer_shapes(theirs.spec):
            expected = getattr(theirs.layer(index), field)
            assert torch.equal(getattr(ours.layer(index), field), expected), field
        assert torch.equal(ours.linear(index, "q_proj"), theirs.linear(index, "q_proj"))
    differs = {"family", "rms_norm_eps", "eos_token_ids", "bos_token_id", "sliding_window", "windowed_layers"}
    for field in set(theirs.spec.__slots__) - differs:
        assert getattr(ours.spec, field) == getattr(theirs.spec, field), field
    assert ours.spec.eos_token_ids == (0,)
    assert ours.spec.rms_norm_eps == pytest.approx(theirs.spec.rms_norm_eps)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_rows_are_dequantised_before_q_and_k_are_reordered(kind: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    type_ = GGMLQuantizationType[kind]
    weights = opened(write_gguf(tmp_path / "m.gguf", model, type_))
    for module, heads in (("q_proj", 4), ("k_proj", 2), ("v_proj", None)):
        weight = model.state_dict()[f"model.layers.1.self_attn.{module}.weight"]
        stored = interleave(weight, heads) if heads else weight
        rounded = torch.tensor(dequantize(quantize(stored.numpy(), type_), type_))
        expected = half_split(rounded, heads) if heads else rounded
        assert torch.equal(weights.linear(1, module).float(), expected)
        assert (expected - weight).abs().max() < 0.1


def test_half_split_undoes_the_converters_interleaving() -> None:
    weight = torch.arange(2 * 6 * 3.0).reshape(12, 3)
    assert torch.equal(half_split(interleave(weight, 2), 2), weight)
    assert half_split(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def rope_of(tmp_path: Path, **extra: Any) -> Any:
    keys = {f"ARCH.rope.{key.replace('__', '.')}": value for key, value in extra.items()}
    return opened(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), extra=keys)).spec.rope


def test_rope_scaling_keys_become_the_spec(tmp_path: Path) -> None:
    assert rope_of(tmp_path, scaling__type="none").kind == "default"
    assert rope_of(tmp_path, scaling__type="linear", scaling__factor=1.0).kind == "default"
    linear = rope_of(tmp_path, scaling__type="linear", scaling__factor=4.0)
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    old = rope_of(tmp_path, scale_linear=2.0)
    assert (old.kind, old.factor) == ("linear", 2.0)
    yarn = rope_of(tmp_path, scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=64)
    assert (yarn.kind, yarn.factor, yarn.original_max_position) == ("yarn", 4.0, 64)
    assert yarn.attention_factor == pytest.approx(1 + 0.1 * np.log(4))


def test_frequency_factors_come_from_their_tensor(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tensors={"rope_freqs.weight": factors})
    assert opened(path).spec.rope.frequency_factors == tuple(factors.tolist())
    for bad in (factors[:4], -factors):
        path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tensors={"rope_freqs.weight": bad})
        with pytest.raises(ModelError, match="rope_freqs"):
            opened(path)


def test_all_tokens_that_end_a_turn_are_known(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 0}
    assert opened(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), extra=extra)).spec.eos_token_ids == (
        0,
        5,
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ARCH.expert_count", 8),
        ("ARCH.rope.scaling.type", "longrope"),
        ("ARCH.rope.dimension_count", 8),
        ("ARCH.attention.value_length", 8),
        ("ARCH.logit_scale", 2.0),
        ("ARCH.attention.causal", False),
        ("ARCH.attention.sliding_window", "long"),
    ],
)
def test_what_the_engine_lacks_is_refused_by_key(key: str, value: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), extra={key: value})
    with pytest.raises(ModelError, match=key.removeprefix("ARCH.").replace(".", r"\.")):
        opened(path)


def test_missing_and_unexpected_tensors_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    path = write_gguf(tmp_path / "m.gguf", model, without=("blk.1.ffn_up.weight",))
    with pytest.raises(ModelError, match=r"lacks the tensor blk\.1\.ffn_up\.weight"):
        opened(path)
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    path = write_gguf(tmp_path / "m.gguf", model, tensors=extra)
    with pytest.raises(ModelError, match=r"holds the tensor blk\.0\.ffn_gate_inp"):
        opened(path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.model_type = "gemma3"
    with pytest.raises(ModelError, match="gemma3"):
        opened(write_gguf(tmp_path / "m.gguf", model))


def test_the_real_models_tensors_equal_those_transformers_loads(real_model: Path, real_oracle: Any) -> None:
    state, weights = real_oracle.state_dict(), opened(real_model)
    assert torch.equal(weights.embedding(), state["model.embed_tokens.weight"])
    assert torch.equal(weights.final_norm(), state["model.norm.weight"])
    for index in range(weights.spec.num_layers):
        layer = weights.layer(index)
        for field in layer_shapes(weights.spec):
            name = f"model.layers.{index}.{LAYER_TENSORS[field]}"
            assert torch.equal(getattr(layer, field), state[name]), name
    assert weights.spec.rope.theta == real_oracle.config.rope_parameters["rope_theta"]
    assert weights.spec.rms_norm_eps == pytest.approx(real_oracle.config.rms_norm_eps)
