"""Llama 2 and 3.x, SmolLM2 and other checkpoints that call themselves `llama`."""

from __future__ import annotations

from polybatch.config import ModelSpec
from polybatch.models.family import Family, decoder_spec, refuse_layer_types
from polybatch.models.fields import Fields


def _read_spec(config: Fields, generation: Fields) -> ModelSpec:
    refuse_layer_types(config, "full_attention")
    bias = config.flag("attention_bias")
    return decoder_spec(
        "llama",
        config,
        generation,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias"),
        bos_token_id=1,
        eos_token_id=2,
    )


FAMILY = Family("llama", "LlamaForCausalLM", _read_spec, gguf_interleaved=True)
