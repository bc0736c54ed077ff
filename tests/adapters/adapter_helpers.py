"""Tiny models of transformers as `ModelWeights`, and what an adapter makes of them."""

from __future__ import annotations

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from polybatch.adapters.weights import AdapterWeights, VocabularyDelta
from polybatch.config import ModelSpec, RopeSpec
from polybatch.models.weights import LayerWeights

SIZES = {
    "vocab_size": 41, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def tiny_model(family: str = "llama", **changes: object) -> PreTrainedModel:
    """A random model, biases and norms included, in float32."""
    torch.manual_seed(7)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    model = model_class(config_class(**{**SIZES, "tie_word_embeddings": False, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


class TransformersWeights:
    """`ModelWeights` over a model of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        c = model.config
        self.model = model
        self.spec = ModelSpec(
            family=c.model_type,
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_layers=c.num_hidden_layers,
            num_heads=c.num_attention_heads,
            num_kv_heads=c.num_key_value_heads,
            head_dim=c.hidden_size // c.num_attention_heads,
            max_position=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            rope=RopeSpec(),
            tie_embeddings=c.tie_word_embeddings,
        )
        self.linear_reads: list[tuple[int, str]] = []

    def embedding(self) -> torch.Tensor:
        return self.model.model.embed_tokens.weight.detach()

    def lm_head(self) -> torch.Tensor:
        return self.model.lm_head.weight.detach()

    def final_norm(self) -> torch.Tensor:
        return self.model.model.norm.weight.detach()

    def _module(self, layer: int, module: str) -> torch.nn.Linear:
        block = self.model.model.layers[layer]
        return getattr(block.self_attn if hasattr(block.self_attn, module) else block.mlp, module)

    def linear(self, layer: int, module: str) -> torch.Tensor:
        self.linear_reads.append((layer, module))
        return self._module(layer, module).weight.detach()

    def layer(self, index: int) -> LayerWeights:
        block = self.model.model.layers[index]
        fields: dict[str, torch.Tensor | None] = {
            "input_norm": block.input_layernorm.weight,
            "post_attention_norm": block.post_attention_layernorm.weight,
        }
        for module in self.spec.linear_shapes:
            short, linear = module.removesuffix("_proj"), self._module(index, module)
            fields[short] = linear.weight.detach()
            fields[short + "_bias"] = None if linear.bias is None else linear.bias.detach()
        return LayerWeights(**fields)


def _changed(table: torch.Tensor, delta: VocabularyDelta | None) -> torch.Tensor:
    if delta is None:
        return table
    return delta.full if delta.full is not None else table + delta.left @ delta.right


def merged(model: PreTrainedModel, adapter: AdapterWeights) -> PreTrainedModel:
    """A copy of the model with the adapter's formula worked into its weights."""
    out = copy.deepcopy(model)
    embed, head = out.model.embed_tokens, out.lm_head
    old = embed.weight.detach().clone(), head.weight.detach().clone()
    embed.weight = torch.nn.Parameter(_changed(old[0], adapter.embedding))
    head.weight = torch.nn.Parameter(_changed(old[1], adapter.lm_head))
    weights = TransformersWeights(out)
    with torch.no_grad():
        for index, modules in enumerate(adapter.layers):
            for name, delta in modules.items():
                linear = weights._module(index, name)
                linear.weight += delta.b.T @ delta.a
                if delta.gain is not None:
                    linear.weight *= delta.gain[:, None]
                if delta.bias is not None:
                    linear.bias += delta.bias
    return out
