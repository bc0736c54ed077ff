"""What the model families have in common: how config.json describes a decoder and names its tensors.

A family file says only where it differs (biases, norms, windows, defaults); this file holds the rest
once. Nothing here reads a tensor. The meaning of every key is that of transformers' config classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from polybatch.config import ModelSpec, RopeSpec
from polybatch.models.fields import MAX_LAYERS, Fields

# Field of LayerWeights -> name in a Hugging Face checkpoint, under "model.layers.<index>."
LAYER_TENSORS: Mapping[str, str] = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "post_attention_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
MODEL_TENSORS: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    model_type: as config.json and GGUF's general.architecture write it. architecture: its causal
    language model in `architectures`. read_spec: config.json and generation_config.json -> ModelSpec.
    gguf_interleaved: its GGUF files order q and k for rotation of neighbouring pairs.
    """

    model_type: str
    architecture: str
    read_spec: Callable[[Fields, Fields], ModelSpec]
    gguf_interleaved: bool = False
    layer_tensors: Mapping[str, str] = field(default_factory=lambda: LAYER_TENSORS)
    model_tensors: Mapping[str, str] = field(default_factory=lambda: MODEL_TENSORS)


def decoder_spec(
    family: str,
    config: Fields,
    generation: Fields,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
    sliding_window: int | None = None,
    windowed_layers: tuple[bool, ...] = (),
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> ModelSpec:
    """ModelSpec from config.json; the keywords are what the family adds or defaults to.

    End-of-sequence ids are those of generation_config.json, else of config.json, as in transformers.
    Raises ModelError for a key that is missing, out of range or asks for something unsupported.
    """
    _refuse_unsupported(config)
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.get("head_dim") is None and head_dim is None and hidden % heads:
        raise config.bad(
            "hidden_size", f"a multiple of num_attention_heads, {heads}, where head_dim is absent"
        )
    eos = generation.token_ids("eos_token_id") or config.token_ids("eos_token_id")
    if not eos and eos_token_id is not None and "eos_token_id" not in config:
        eos = (eos_token_id,)
    bos = config.optional_integer("bos_token_id")
    if bos is None and "bos_token_id" not in config:
        bos = bos_token_id
    return ModelSpec(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim", head_dim or hidden // heads),
        max_position=config.integer("max_position_embeddings"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope_spec(config),
        tie_embeddings=config.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        sliding_window=sliding_window,
        windowed_layers=windowed_layers,
        eos_token_ids=eos,
        bos_token_id=bos,
    )


def _refuse_unsupported(config: Fields) -> None:
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise config.bad("hidden_act", "silu")
    if config.get("use_mrope"):
        raise config.bad("use_mrope", "false: multimodal positions are not supported")


_ROPE_KEYS = frozenset(
    ["rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
     "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale",
     "mscale_all_dim", "truncate"]
)  # fmt: skip


def rope_spec(config: Fields) -> RopeSpec:
    """RopeSpec from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (before)."""
    rope = config.section("rope_scaling") or config.section("rope_parameters")
    rope = rope or Fields({}, config.source)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise rope.bad("rope_type" if "rope_type" in rope else "type", "default, linear, llama3 or yarn")
    rope.refuse_others(_ROPE_KEYS)
    for origin in (rope, config):
        if origin.number("partial_rotary_factor", 1.0) != 1.0:
            raise origin.bad("partial_rotary_factor", "1: rotation of a part of the head is not supported")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind=kind, factor=rope.number("factor"))
    longest = config.integer("max_position_embeddings")
    original = config.optional_integer("original_max_position_embeddings", low=1)
    original = original or rope.integer("original_max_position_embeddings", longest)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.bad("low_freq_factor", f"less than high_freq_factor, {high}")
        return RopeSpec(
            theta=theta,
            kind=kind,
            factor=rope.number("factor"),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if theta <= 1:
        raise rope.bad("rope_theta", "above 1 for rope type yarn")
    return RopeSpec(
        theta=theta,
        kind=kind,
        factor=rope.number("factor", longest / original),
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )


def refuse_layer_types(config: Fields, expected: str) -> None:
    """For families whose layers are all alike: raise ModelError where `layer_types` says otherwise."""
    kinds = config.texts("layer_types")
    if kinds is not None and set(kinds) - {expected}:
        raise config.bad("layer_types", f"{expected!r} throughout for this model_type")


def qwen_windows(config: Fields) -> tuple[int | None, tuple[bool, ...]]:
    """Window in tokens and which layers have it, from Qwen's four keys; (None, ()) without windows."""
    num_layers = config.integer("num_hidden_layers", high=MAX_LAYERS)
    kinds = config.texts("layer_types")
    if kinds is not None and (
        len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}
    ):
        raise config.bad("layer_types", f"{num_layers} times full_attention or sliding_attention")
    window = config.integer("sliding_window", 4096) if config.flag("use_sliding_window") else None
    if kinds is None:
        first = config.integer("max_window_layers", 28, low=0)
        windowed = tuple(window is not None and layer >= first for layer in range(num_layers))
    else:
        windowed = tuple(kind == "sliding_attention" for kind in kinds)
    if not any(windowed):
        return None, ()
    if window is None:
        raise config.bad("layer_types", "full_attention throughout where use_sliding_window is false")
    return window, windowed
