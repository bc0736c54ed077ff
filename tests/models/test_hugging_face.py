"""Hugging Face directories: what transformers saves is what we read; what is wrong is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import TINY_MODELS, tiny_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from polybatch.errors import ModelError
from polybatch.models import hugging_face
from polybatch.models.checkpoint import CheckpointWeights, layer_shapes
from polybatch.models.family import LAYER_TENSORS
from polybatch.models.hugging_face import INDEX, SINGLE, open_directory
from polybatch.models.loader import load_model


def assert_same(weights: CheckpointWeights, model: PreTrainedModel) -> None:
    """Every tensor of the model is read, bit by bit, under the field it belongs to."""
    state = model.state_dict()
    assert torch.equal(weights.embedding(), state["model.embed_tokens.weight"])
    assert torch.equal(weights.final_norm(), state["model.norm.weight"])
    assert torch.equal(weights.lm_head(), state["lm_head.weight"])
    in_layers = 0
    for index in range(weights.spec.num_layers):
        layer = weights.layer(index)
        for field, name in LAYER_TENSORS.items():
            expected = state.get(f"model.layers.{index}.{name}")
            read = getattr(layer, field)
            assert (read is None) == (expected is None), (field, index)
            if expected is not None:
                assert torch.equal(read, expected), (field, index)
                in_layers += 1
        for module in weights.spec.linear_shapes:
            assert torch.equal(weights.linear(index, module), getattr(layer, module.removesuffix("_proj")))
    assert in_layers == len(state) - 3


@pytest.mark.parametrize("name", TINY_MODELS)
def test_saved_checkpoints_are_read_back_tensor_by_tensor(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    weights = open_directory(tmp_path)
    assert_same(weights, model)
    config = model.config
    assert weights.spec.family == config.model_type
    assert weights.spec.rope.theta == config.rope_parameters["rope_theta"]
    assert weights.spec.rope.kind == config.rope_parameters["rope_type"]
    assert weights.spec.head_dim == model.model.layers[0].self_attn.head_dim
    for index in range(weights.spec.num_layers):
        expected = getattr(model.model.layers[index].self_attn, "sliding_window", None)
        if config.model_type == "mistral":
            expected = config.sliding_window
        assert weights.spec.window(index) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_keep_the_checkpoints_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model("qwen3").to(dtype)
    model.save_pretrained(tmp_path)
    weights = open_directory(tmp_path)
    assert weights.linear(0, "q_proj").dtype is dtype
    assert_same(weights, model)


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / SINGLE).exists()
    assert_same(open_directory(tmp_path), model)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model("qwen2").save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path / SINGLE).items()}
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / SINGLE)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop(DOWN), rf"lacks the tensor {DOWN}"),
        (lambda t: t.update({DOWN: t[DOWN].T.contiguous()}), rf"{DOWN} has the shape \[96, 64\]"),
        (lambda t: t.update({DOWN: t[DOWN].to(torch.float64)}), rf"{DOWN} has the type F64"),
        (lambda t: t.update({"model.layers.0.extra": t[DOWN]}), "holds the tensor model.layers.0.extra"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[DOWN]}), "model.layers.2.mlp.up_proj"),
    ],
)
def test_wrong_tensors_are_refused_by_name(
    checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object], complaint: str
) -> None:
    edit_tensors(checkpoint, change)
    with pytest.raises(ModelError, match=complaint):
        open_directory(checkpoint)


def test_tensors_that_the_settings_recompute_are_tolerated(checkpoint: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    edit_tensors(checkpoint, add)
    assert "q_bias" in layer_shapes(open_directory(checkpoint).spec)


def test_pickled_weights_are_never_opened(checkpoint: Path) -> None:
    (checkpoint / SINGLE).unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="pickled weights are never opened"):
        open_directory(checkpoint)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "weights.bin", ""])
def test_an_index_cannot_name_files_elsewhere(checkpoint: Path, name: str) -> None:
    (checkpoint / SINGLE).unlink()
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(ModelError, match="no safetensors file of this directory"):
        open_directory(checkpoint)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"x": 1}}', "{", '{"weight_map": []}'])
def test_a_malformed_index_is_refused(checkpoint: Path, index: str) -> None:
    (checkpoint / SINGLE).unlink()
    (checkpoint / INDEX).write_text(index)
    with pytest.raises(ModelError, match="index"):
        open_directory(checkpoint)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / SINGLE).unlink()
    (checkpoint / INDEX).write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ModelError, match="model-00001-of-00002"):
        open_directory(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000])
def test_truncated_safetensors_are_refused(checkpoint: Path, keep: int) -> None:
    data = (checkpoint / SINGLE).read_bytes()
    (checkpoint / SINGLE).write_bytes(data[:keep])
    with pytest.raises(ModelError, match=SINGLE):
        open_directory(checkpoint)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"model_type": 3}', "[" * 100_000])
def test_malformed_settings_are_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_directory(checkpoint)


def test_an_offline_hub_name_says_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not in the local cache"):
        hugging_face.fetch("owner/some-model", None)
    with pytest.raises(ModelError, match="neither a path nor a hub name"):
        hugging_face.fetch("owner/some model/x", None)


def test_a_hub_name_is_fetched_without_code_or_pickles_and_then_opened(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client is replaced: what it would be asked for is what must hold."""
    import fnmatch

    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def snapshot_download(
        name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        def is_wanted(file: str) -> bool:
            allowed = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            return allowed and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns)

        assert all(map(is_wanted, ("config.json", SINGLE, INDEX, "tokenizer.json", "generation_config.json")))
        assert not any(map(is_wanted, ("pytorch_model.bin", "modeling_x.py", "model.pkl", "model.pt")))
        asked.append((name, revision))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    told: list[str] = []
    loaded = load_model("owner/some-model", revision="v1", progress=told.append)
    assert asked == [("owner/some-model", "v1")]
    assert loaded.path == checkpoint
    assert loaded.fingerprint == load_model(str(checkpoint)).fingerprint
    assert "owner/some-model" in told[0]


def test_a_hub_that_answers_with_an_error_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(name: str, **options: object) -> str:
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"owner/some-model.*503"):
        hugging_face.fetch("owner/some-model", None)
