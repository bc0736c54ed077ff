"""Any model that the engine can open as a transformers model, for comparison only.

The configuration is written from the ModelSpec and the tensors come from ModelWeights, so it works for
GGUF files as well. transformers is imported when asked for: the engine itself does without it.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from polybatch.config import ModelSpec, RopeSpec
from polybatch.errors import ModelError
from polybatch.models.checkpoint import layer_shapes
from polybatch.models.registry import find_family
from polybatch.models.weights import ModelWeights


def to_transformers(weights: ModelWeights) -> Any:
    """A `PreTrainedModel` in float32 on the CPU, in evaluation mode, with plain attention.

    Takes four bytes per parameter. Raises ModelError for a model that its transformers family cannot
    express, ImportError without transformers.
    """
    transformers = importlib.import_module("transformers")
    spec = weights.spec
    # GGUF files call Mistral llama; only the window tells.
    name = "mistral" if spec.family == "llama" and spec.sliding_window else spec.family
    family = find_family(name, "selfcheck")
    model_class = getattr(transformers, family.architecture)
    config = model_class.config_class(**_settings(spec))
    config._attn_implementation = "eager"
    # Built without memory: initialising what the checkpoint overwrites takes longer than loading it.
    with torch.device("meta"):
        model = model_class(config)
    expected = model.state_dict()
    state = {family.model_tensors["embedding"]: _copied(weights.embedding())}
    state[family.model_tensors["final_norm"]] = _copied(weights.final_norm())
    if not spec.tie_embeddings:
        state[family.model_tensors["lm_head"]] = _copied(weights.lm_head())
    for index in range(spec.num_layers):
        layer = weights.layer(index)
        for field in layer_shapes(spec):
            state[f"model.layers.{index}.{family.layer_tensors[field]}"] = _copied(getattr(layer, field))
    for key, tensor in expected.items():
        # One flag switches on the biases of several layers; those that the checkpoint lacks are 0.
        if key not in state and key.endswith(".bias"):
            state[key] = torch.zeros(tensor.shape)
    tied = {family.model_tensors["lm_head"]} if spec.tie_embeddings else set()
    if wrong := sorted(expected.keys() ^ state.keys() ^ tied):
        raise ModelError(
            f"transformers has no {name} model with the tensors of this one; "
            f"{wrong[0]} is one of {len(wrong)} that only one of them has"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(config)
    if spec.rope.frequency_factors is not None:
        rotary.inv_freq /= torch.tensor(spec.rope.frequency_factors)
    model.model.rotary_emb = rotary
    return model.eval()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 and not shared: peft writes into the parameters that an adapter replaces."""
    return tensor.to(torch.float32, copy=True)


def _settings(spec: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of the family's configuration class; each takes those that it knows."""
    windows = [spec.window(layer) is not None for layer in range(spec.num_layers)]
    settings: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.rms_norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_bias": spec.qkv_bias or spec.o_bias,
        "mlp_bias": spec.mlp_bias,
        "sliding_window": spec.sliding_window,
        "rope_theta": spec.rope.theta,
        "rope_scaling": _rope_scaling(spec.rope),
    }
    if spec.family.startswith("qwen"):
        settings["use_sliding_window"] = any(windows)
        settings["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return settings


def _rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    settings: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    extra = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    }[rope.kind]
    settings |= {name: getattr(rope, name) for name in extra if getattr(rope, name) is not None}
    if rope.kind != "linear" and rope.original_max_position is not None:
        settings["original_max_position_embeddings"] = rope.original_max_position
    return settings


__all__ = ["to_transformers"]
