"""Random LoRA adapters in PEFT's directory format, for measuring speed; they teach the model nothing.

The values are small enough for the outputs to stay finite and large enough to change them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from polybatch.config import ModelSpec

BLOCK = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn",
    "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip


def write_adapters(spec: ModelSpec, ranks: Mapping[str, int], folder: Path) -> dict[str, Path]:
    """Write one adapter on all seven linears per name -> rank; give their directories by name.

    bfloat16, alpha = 2 * rank. An adapter that is already there with the same rank and model shape is kept:
    values depend on the position among `ranks` alone.
    """
    return {
        name: _write_one(spec, rank, seed, folder / name) for seed, (name, rank) in enumerate(ranks.items())
    }


def _config(spec: ModelSpec, rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"{spec.family}-{spec.num_layers}x{spec.hidden_size}",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(spec.linear_shapes),
    }


def _write_one(spec: ModelSpec, rank: int, seed: int, folder: Path) -> Path:
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = _config(spec, rank)
    if weights_file.exists() and config_file.exists() and json.loads(config_file.read_text()) == config:
        return folder
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(spec.num_layers):
        for module, (out, width) in spec.linear_shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{BLOCK[module]}.{module}"
            a = torch.randn(rank, width, generator=generator) / width**0.5
            b = torch.randn(out, rank, generator=generator) * 0.01
            tensors[f"{prefix}.lora_A.weight"] = a.to(torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = b.to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, weights_file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(config, indent=1))
    return folder
