"""Qwen2 and Qwen2.5: biases on q, k and v; sliding windows on the upper layers where switched on."""

from __future__ import annotations

from polybatch.config import ModelSpec
from polybatch.models.family import Family, decoder_spec, qwen_windows
from polybatch.models.fields import Fields


def _read_spec(config: Fields, generation: Fields) -> ModelSpec:
    window, layers = qwen_windows(config)
    return decoder_spec(
        "qwen2", config, generation, qkv_bias=True, sliding_window=window, windowed_layers=layers
    )


FAMILY = Family("qwen2", "Qwen2ForCausalLM", _read_spec)
