"""What `load_peft` makes of a directory equals what peft makes of it, or is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_helpers import RecordingWeights, tiny_model
from helpers import merged_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from polybatch.adapters import peft_files
from polybatch.adapters.peft_lora import digest, load_peft
from polybatch.adapters.weights import AdapterWeights
from polybatch.errors import AdapterError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOKENS = torch.tensor([[3, 17, 40, 0, 22, 9, 9, 31]])


def save_adapter(model: Any, path: Path, **config: Any) -> Path:
    """An adapter of peft for a copy of the model, with every trainable weight random."""
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn_like(parameter) * 0.2
                    parameter.copy_(parameter.abs() + 0.5 if "magnitude" in name else parameter + noise)
        wrapped.save_pretrained(path)
    return path


def peft_outputs(model: Any, path: Path) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """peft's logits, and (input, output) of each of its linear layers by module path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = PeftModel.from_pretrained(copy.deepcopy(model), path).eval()
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in oracle.base_model.model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _m, args, out, name=name: seen.__setitem__(name, (args[0].detach(), out.detach()))
            )
    with torch.no_grad():
        return oracle(TOKENS).logits, seen


def assert_equals_peft(model: Any, path: Path) -> AdapterWeights:
    adapter = load_peft(path, RecordingWeights(copy.deepcopy(model)))
    logits, seen = peft_outputs(model, path)
    for name, (x, y) in seen.items():
        _, _, index, _, module = name.split(".")
        linear = model.get_submodule(name)
        want = x @ linear.weight.T
        delta = adapter.layers[int(index)].get(module)
        if delta is not None:
            want = want + (x @ delta.a.T) @ delta.b
            want = want if delta.gain is None else want * delta.gain
            want = want if delta.bias is None else want + delta.bias
        want = want if linear.bias is None else want + linear.bias
        torch.testing.assert_close(want, y, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(merged_model(model, adapter)(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
        assert (merged_model(model, adapter)(TOKENS).logits - model(TOKENS).logits).abs().max() > 1e-3
    return adapter


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {"r": 3, "target_modules": ATTENTION}),
    "all linear": ("llama", {}, {"r": 2, "target_modules": "all-linear", "lora_alpha": 5}),
    "regex": ("llama", {}, {"r": 4, "target_modules": r".*layers\.[02]\..*(q|up)_proj"}),
    "rank and alpha patterns": (
        "llama",
        {},
        {
            "r": 2,
            "target_modules": [*ATTENTION, "down_proj"],
            # The first match counts, and peft sorts the patterns when it saves them.
            "rank_pattern": {r"^model.layers.1.self_attn.v_proj": 1, r"layers\.2\..*": 3, "q_proj": 5},
            "alpha_pattern": {"down_proj": 7, r"self_attn.q_proj": 4},
        },
    ),
    "rslora with patterns": (
        "llama",
        {},
        {"r": 4, "use_rslora": True, "target_modules": ATTENTION, "rank_pattern": {"k_proj": 9}},
    ),
    "dora": ("llama", {}, {"r": 3, "use_dora": True, "target_modules": "all-linear"}),
    "dora with biases": (
        "qwen2",
        {},
        {
            "r": 3,
            "use_dora": True,
            "use_rslora": True,
            "bias": "all",
            "target_modules": ["q_proj", "up_proj"],
        },
    ),
    "some layers": (
        "llama",
        {},
        {"r": 2, "target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    ),
    "one layer by pattern": (
        "llama",
        {},
        {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "excluded modules": (
        "llama",
        {},
        {"r": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    ),
    "bias all": ("qwen2", {}, {"r": 2, "bias": "all", "target_modules": ["q_proj"]}),
    "bias lora only": ("qwen2", {}, {"r": 2, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    "saved tables": (
        "llama",
        {},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "saved head, tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "saved embedding, tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "saved embedding, kept tied": (
        "llama",
        {"tie_word_embeddings": True},
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "pairs on tables": ("llama", {}, {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "pair on embedding, tied": (
        "qwen2",
        {"tie_word_embeddings": True},
        {"r": 4, "target_modules": ["embed_tokens", "v_proj"]},
    ),
    "pair on head, tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"r": 4, "target_modules": ["lm_head"]},
    ),
    "pair on embedding, kept tied": (
        "llama",
        {"tie_word_embeddings": True},
        {"r": 4, "target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
    ),
    "dora on tables": (
        "llama",
        {},
        {"r": 2, "use_dora": True, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    ),
    "fan_in_fan_out has no effect": (
        "llama",
        {},
        {"r": 2, "fan_in_fan_out": True, "target_modules": ["q_proj"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layer_equals_peft(case: str, tmp_path: Path) -> None:
    family, changes, config = CASES[case]
    model = tiny_model(family, **changes)
    assert_equals_peft(model, save_adapter(model, tmp_path / "a", **config))


@pytest.fixture
def model() -> Any:
    return tiny_model("qwen2")


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    return save_adapter(model, tmp_path / "saved", r=3, target_modules=["q_proj", "up_proj"])


def edit(path: Path, tensors: dict[str, torch.Tensor | None] | None = None, **config: Any) -> Path:
    """Change keys of a saved adapter's configuration and its tensors; None removes a tensor."""
    raw = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**raw, **config}))
    if tensors is not None:
        stored = {**load_file(path / "adapter_model.safetensors"), **tensors}
        save_file({k: v for k, v in stored.items() if v is not None}, path / "adapter_model.safetensors")
    return path


def name_of(layer: int, module: str, part: str) -> str:
    parent = "self_attn" if module in ATTENTION else "mlp"
    return f"base_model.model.model.layers.{layer}.{parent}.{module}.{part}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("target_parameters", ["mlp.experts"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("lora_bias", True),
        ("megatron_config", {"a": 1}),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1}),
        ("arrow_config", {"top_k": 2}),
        ("monteclora_config", {"x": 1}),
        ("a_key_of_tomorrow", 1),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", float("nan")),
        ("bias", "some"),
        ("use_dora", "yes"),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"q_proj": -1}),
        ("target_modules", "("),
        ("target_modules", [3]),
        ("layers_to_transform", ["0"]),
    ],
)
def test_an_unsupported_or_bad_key_is_refused_by_name(key: str, value: Any, model: Any, saved: Path) -> None:
    with pytest.raises(AdapterError, match=key):
        load_peft(edit(saved, **{key: value}), RecordingWeights(model))


def test_keys_that_matter_only_in_training_are_accepted(model: Any, saved: Path) -> None:
    before = load_peft(saved, RecordingWeights(model)).digest
    edit(saved, lora_dropout=0.3, inference_mode=False, init_lora_weights="gaussian", a_key_of_tomorrow=None)
    assert load_peft(saved, RecordingWeights(model)).digest == before


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({name_of(0, "q_proj", "lora_B.weight"): None}, "only one half"),
        (
            {name_of(1, "up_proj", f"lora_{x}.weight"): None for x in "AB"},
            r"lacks .*layers\.1\.mlp\.up_proj",
        ),
        ({name_of(0, "v_proj", "lora_A.weight"): torch.ones(3, 24),
          name_of(0, "v_proj", "lora_B.weight"): torch.ones(12, 3)}, r"v_proj.*does not target"),
        ({name_of(0, "q_proj", "lora_A.weight"): torch.ones(4, 24)}, r"\[4, 24\].*\[3, 24\]"),
        ({name_of(0, "q_proj", "lora_A.weight"): torch.ones(3, 25)}, r"\[3, 25\].*\[3, 24\]"),
        ({name_of(0, "q_proj", "lora_A.weight"): torch.ones(3)}, r"\[3\].*\[3, 24\]"),
        ({name_of(0, "q_proj", "lora_A.weight"): torch.full((3, 24), torch.nan)}, "NaN"),
        ({name_of(0, "q_proj", "lora_B.weight"): torch.full((24, 3), 3e38)}, "exceeds float32"),
        ({name_of(0, "q_proj", "lora_A.weight"): torch.ones(3, 24, dtype=torch.int8)}, "I8"),
        ({name_of(3, "q_proj", "lora_A.weight"): torch.ones(3, 24)}, "layer 3.*3 layers"),
        ({name_of(0, "q_proj", "lora_magnitude_vector"): torch.ones(24)}, "use_dora is False"),
        ({name_of(0, "q_proj", "lora_B.bias"): torch.ones(24)}, "lora_B.bias"),
        ({name_of(0, "q_proj", "base_layer.bias"): torch.ones(24)}, "bias none"),
        ({name_of(0, "q_proj", "weight"): torch.ones(24, 24)}, "not supported there"),
        ({"base_model.model.model.norm.weight": torch.ones(24)}, "changes model.norm"),
        ({"base_model.model.score.weight": torch.ones(2, 24)}, "changes score"),
        ({"base_model.model.model.layers.0.mlp.q_proj.lora_A.weight": torch.ones(3, 24)}, "mlp.q_proj"),
        ({"base_model.model.lm_head.weight": torch.ones(43, 24)}, r"\[43, 24\].*vocabulary resized"),
        ({"prompt_embeddings": torch.ones(4, 24)}, "prompt_embeddings"),
    ],
)  # fmt: skip
def test_a_tensor_out_of_place_is_refused_by_name(
    tensors: dict[str, torch.Tensor | None], message: str, model: Any, saved: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        load_peft(edit(saved, tensors), RecordingWeights(model))


def test_dora_without_magnitudes_is_refused(model: Any, saved: Path) -> None:
    with pytest.raises(AdapterError, match="no lora_magnitude_vector, but use_dora is True"):
        load_peft(edit(saved, use_dora=True), RecordingWeights(model))


def test_a_saved_table_that_the_file_lacks_is_refused(model: Any, saved: Path) -> None:
    with pytest.raises(AdapterError, match="lacks the table of lm_head"):
        load_peft(edit(saved, modules_to_save=["lm_head"]), RecordingWeights(model))


def test_a_bias_on_a_layer_without_one_is_refused(saved: Path) -> None:
    bias = {name_of(0, "q_proj", "base_layer.bias"): torch.ones(24)}
    with pytest.raises(AdapterError, match="the base model has none"):
        load_peft(edit(saved, bias, bias="all"), RecordingWeights(tiny_model("llama")))


def test_shapes_are_refused_before_any_base_weight_is_read(model: Any, tmp_path: Path) -> None:
    path = save_adapter(model, tmp_path / "a", r=3, use_dora=True, target_modules=["q_proj"])
    base = RecordingWeights(model)
    with pytest.raises(AdapterError):
        load_peft(edit(path, {name_of(2, "q_proj", "lora_A.weight"): torch.ones(3, 9)}), base)
    assert base.linear_reads == []


def test_pickled_weights_are_refused_with_a_way_out(model: Any, saved: Path) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickle.*safe_serialization"):
        load_peft(saved, RecordingWeights(model))


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x10\0\0\0\0\0\0\0not json at all!"])
def test_a_malformed_weights_file_is_refused(content: bytes, model: Any, saved: Path) -> None:
    (saved / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_peft(saved, RecordingWeights(model))


def test_a_truncated_weights_file_is_refused(model: Any, saved: Path) -> None:
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_peft(saved, RecordingWeights(model))


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
def test_a_malformed_configuration_is_refused(content: str, model: Any, saved: Path) -> None:
    (saved / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_peft(saved, RecordingWeights(model))


def test_path_errors_say_what_to_give(model: Any, saved: Path) -> None:
    base = RecordingWeights(model)
    with pytest.raises(AdapterError, match="does not exist"):
        load_peft(saved / "nowhere", base)
    with pytest.raises(AdapterError, match="is a file"):
        load_peft(saved / "adapter_config.json", base)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model\.safetensors"):
        load_peft(saved, base)
    (saved / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        load_peft(saved, base)


def test_equal_weights_have_equal_digests_whatever_splits_their_scaling(model: Any, saved: Path) -> None:
    base = RecordingWeights(model)
    first = load_peft(saved, base)
    doubled = {k: v / 2 for k, v in load_file(saved / "adapter_model.safetensors").items() if "lora_B" in k}
    again = load_peft(edit(saved, doubled, lora_alpha=16), base)
    assert again.digest == first.digest
    assert load_peft(edit(saved, lora_alpha=17), base).digest != first.digest


def test_one_changed_value_changes_the_digest(model: Any, saved: Path) -> None:
    base = RecordingWeights(model)
    first = load_peft(saved, base).digest
    name = name_of(2, "up_proj", "lora_A.weight")
    row = load_file(saved / "adapter_model.safetensors")[name]
    row[2, 23] += 1e-3
    assert load_peft(edit(saved, {name: row}), base).digest != first


def test_deltas_are_contiguous_float32_whatever_the_file_holds(model: Any, saved: Path) -> None:
    halves = {k: v.bfloat16() for k, v in load_file(saved / "adapter_model.safetensors").items()}
    adapter = load_peft(edit(saved, halves), RecordingWeights(model))
    for delta in (d for layer in adapter.layers for d in layer.values()):
        for tensor in (delta.a, delta.b):
            assert tensor.dtype == torch.float32
            assert tensor.is_contiguous()


def test_an_adapter_does_not_follow_its_file_once_loaded(model: Any, saved: Path) -> None:
    adapter = load_peft(saved, RecordingWeights(model))
    file = saved / "adapter_model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.seek(size // 2)
        handle.write(b"\0" * (size - size // 2))
    assert digest(adapter.layers, adapter.embedding, adapter.lm_head) == adapter.digest


def test_an_adapter_larger_than_the_model_is_refused(
    model: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_files, "MIN_LIMIT_BYTES", 0)
    load_peft(saved, RecordingWeights(model))
    path = save_adapter(model, saved.parent / "large", r=100, target_modules="all-linear")
    with pytest.raises(AdapterError, match="merge the adapter"):
        load_peft(path, RecordingWeights(model))


@pytest.mark.parametrize(
    "config", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}]
)
def test_tying_kept_needs_both_ends_in_the_file(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    config = {"r": 2, "target_modules": ["q_proj"], "ensure_weight_tying": True, **config}
    path = save_adapter(model, tmp_path / "a", **config)
    load_peft(path, RecordingWeights(model))
    names = load_file(path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lacks the .* of lm_head"):
        load_peft(edit(path, {name: None for name in names if "lm_head" in name}), RecordingWeights(model))


def test_unchanged_stored_tables_cost_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    path = save_adapter(model, tmp_path / "a", r=2, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in load_file(path / "adapter_model.safetensors")
    adapter = load_peft(path, RecordingWeights(model))
    assert adapter.lm_head is None
    assert adapter.embedding is not None
    assert adapter.embedding.full is None


def test_a_replaced_table_of_a_tied_model_changes_both_ends(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    path = save_adapter(model, tmp_path / "a", r=2, target_modules=["q_proj"])
    table = {"base_model.model.model.embed_tokens.weight": torch.randn(41, 24)}
    adapter = assert_equals_peft(model, edit(path, table))
    assert adapter.embedding is not None
    assert adapter.lm_head is not None
