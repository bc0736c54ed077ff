"""Write a PEFT LoRA as the GGUF adapter that llama.cpp reads.

llama.cpp rotates neighbouring pairs in Llama's query and key heads where Hugging Face rotates halves, so the
rows of `B` of those two are reordered, as the rows of the base weights are.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

from polybatch.config import ModelSpec

NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
PAIRED_FAMILIES = ("llama", "mistral")


def interleave_halves(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder each head's rows from [first half, second half] to neighbouring pairs. rows: [out, rank]."""
    out, rank = rows.shape
    halves = rows.reshape(num_heads, 2, out // num_heads // 2, rank)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(out, rank))


def write_gguf_lora(spec: ModelSpec, folder: Path, out: Path) -> None:
    """Convert a PEFT directory; float32 throughout, as llama.cpp computes with it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    # llama.cpp knows Mistral as a Llama.
    architecture = "llama" if spec.family in PAIRED_FAMILIES else spec.family
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        parts = name.split(".")
        layer, module, side = parts[parts.index("layers") + 1], parts[-3], parts[-2]
        values = tensor.to(torch.float32).numpy()
        if side == "lora_B" and module in ("q_proj", "k_proj") and spec.family in PAIRED_FAMILIES:
            values = interleave_halves(values, spec.num_heads if module == "q_proj" else spec.num_kv_heads)
        writer.add_tensor(f"blk.{layer}.{NAMES[module]}.weight.{side.lower()}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
