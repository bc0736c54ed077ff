"""GGUF files made in tests, from tiny transformers models and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from transformers import PreTrainedModel

from polybatch.models.family import LAYER_TENSORS, MODEL_TENSORS
from polybatch.models.gguf_model import _LAYER_TENSORS, _MODEL_TENSORS
from polybatch.tokenizer import BYTE_ALPHABET

F32 = GGMLQuantizationType.F32


def interleave(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp's converter orders them for Llama: halves of a head become pairs."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def tiny_vocabulary(num_tokens: int) -> list[str]:
    """A byte-level vocabulary: an end token, characters, and two merged tokens."""
    return ["<|end|>", *list(BYTE_ALPHABET)[: num_tokens - 3], "th", "the"]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: GGMLQuantizationType = F32,
    extra: dict[str, int | float | str | bool] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write a tiny model as llama.cpp's converter would: linear layers in `kind`, the rest in F32."""
    config = model.config
    arch = "llama" if config.model_type == "mistral" else config.model_type
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tiny_vocabulary(config.vocab_size))
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    for key, value in (extra or {}).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](key.replace("ARCH", arch), value)
    for name, tensor in gguf_tensors(model, arch).items():
        if name in without:
            continue
        if kind is not F32 and tensor.ndim == 2 and "embd" not in name:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    """A model's tensors under GGUF names, q and k interleaved where the architecture asks for it."""
    config, state = model.config, model.state_dict()
    found = {}
    for field, name in _MODEL_TENSORS.items():
        if field != "lm_head" or not config.tie_word_embeddings:
            found[name] = state[MODEL_TENSORS[field]].numpy()
    for index in range(config.num_hidden_layers):
        for field, name in _LAYER_TENSORS.items():
            tensor = state.get(f"model.layers.{index}.{LAYER_TENSORS[field]}")
            if tensor is None:
                continue
            if arch == "llama" and name.startswith(("attn_q.", "attn_k.")):
                heads = config.num_attention_heads if field.startswith("q") else config.num_key_value_heads
                tensor = interleave(tensor, heads)
            found[f"blk.{index}.{name}"] = np.ascontiguousarray(tensor.numpy())
    return found
