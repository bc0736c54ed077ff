"""Qwen3, dense: RMSNorm on each head of q and k, head_dim of its own, no biases by default."""

from __future__ import annotations

from polybatch.config import ModelSpec
from polybatch.models.family import Family, decoder_spec, qwen_windows
from polybatch.models.fields import Fields


def _read_spec(config: Fields, generation: Fields) -> ModelSpec:
    window, layers = qwen_windows(config)
    bias = config.flag("attention_bias")
    return decoder_spec(
        "qwen3",
        config,
        generation,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        head_dim=128,
        sliding_window=window,
        windowed_layers=layers,
    )


FAMILY = Family("qwen3", "Qwen3ForCausalLM", _read_spec)
