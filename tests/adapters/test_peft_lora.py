"""What `load_peft` makes of a directory equals what peft makes of it, or is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_helpers import TransformersWeights, merged, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from polybatch.adapters.peft_lora import load_peft
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
    base = TransformersWeights(copy.deepcopy(model))
    adapter = load_peft(path, base)
    logits, seen = peft_outputs(model, path)
    for name, (x, y) in seen.items():
        _, _, index, _, module = name.split(".")
        linear = base._module(int(index), module)
        want = x @ linear.weight.T
        delta = adapter.layers[int(index)].get(module)
        if delta is not None:
            want = want + (x @ delta.a.T) @ delta.b
            want = want if delta.gain is None else want * delta.gain
            want = want if delta.bias is None else want + delta.bias
        want = want if linear.bias is None else want + linear.bias
        torch.testing.assert_close(want, y, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(merged(model, adapter)(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
        assert (merged(model, adapter)(TOKENS).logits - model(TOKENS).logits).abs().max() > 1e-3
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
