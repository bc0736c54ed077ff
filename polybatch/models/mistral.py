"""Mistral: Llama's layers with one sliding window for all of them. Its GGUF files call it llama."""

from __future__ import annotations

from polybatch.config import ModelSpec
from polybatch.models.family import Family, decoder_spec, refuse_layer_types
from polybatch.models.fields import Fields


def _read_spec(config: Fields, generation: Fields) -> ModelSpec:
    # Null means no window; a file that lacks the key means the first release's 4,096.
    window = config.optional_integer("sliding_window", low=1) if "sliding_window" in config else 4096
    refuse_layer_types(config, "full_attention" if window is None else "sliding_attention")
    return decoder_spec("mistral", config, generation, sliding_window=window, bos_token_id=1, eos_token_id=2)


FAMILY = Family("mistral", "MistralForCausalLM", _read_spec, gguf_interleaved=True)
