"""Models in GGUF files: metadata -> ModelSpec, tensors -> ModelWeights.

Not the file format itself (gguf_file) nor the tokenizer (gguf_tokenizer).
Sources: the GGUF specification's standard keys; llama.cpp's conversion script for tensor names and
for the order of q and k.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import torch

from polybatch.config import ModelSpec, RopeSpec
from polybatch.errors import ModelError
from polybatch.models.checkpoint import CheckpointWeights
from polybatch.models.family import Family
from polybatch.models.fields import MAX_LAYERS, Fields
from polybatch.models.gguf_file import GgufFile
from polybatch.models.registry import find_family

_LAYER_TENSORS = {
    "input_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "post_attention_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "gate_bias": "ffn_gate.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
}
_MODEL_TENSORS = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_FREQUENCY_FACTORS = "rope_freqs.weight"
_INTERLEAVED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")
# Keys that change the arithmetic in ways this engine lacks -> the value that changes nothing.
_NEUTRAL = {
    "expert_count": 0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}


def open_gguf(file: GgufFile) -> CheckpointWeights:
    """Weights of a GGUF file, checked against its metadata; dequantised tensor by tensor as asked for.

    Raises ModelError for metadata that is missing, malformed or asks for something unsupported.
    """
    metadata = Fields(file.metadata, str(file.path))
    family = find_family(metadata.text("general.architecture"), metadata.source)
    source = GgufSource(file, family, _spec(file, metadata, family))

    def locate(field: str, layer: int | None) -> str:
        return _MODEL_TENSORS[field] if layer is None else f"blk.{layer}.{_LAYER_TENSORS[field]}"

    return CheckpointWeights(source.spec, source, locate, lambda name: name == _FREQUENCY_FACTORS)


def _spec(file: GgufFile, metadata: Fields, family: Family) -> ModelSpec:
    prefix = family.model_type
    for key, neutral in _NEUTRAL.items():
        if metadata.get(f"{prefix}.{key}") not in (None, neutral):
            raise metadata.bad(f"{prefix}.{key}", f"{neutral} or absent: others are not supported")
    hidden = metadata.integer(f"{prefix}.embedding_length")
    heads = metadata.integer(f"{prefix}.attention.head_count")
    head_dim = metadata.integer(f"{prefix}.attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(f"{prefix}.{key}", head_dim) != head_dim:
            raise metadata.bad(f"{prefix}.{key}", f"the length of a key, {head_dim}")
    embedding = file.tensors.get(_MODEL_TENSORS["embedding"])
    if embedding is None:
        raise ModelError(f"{file.path} lacks the tensor {_MODEL_TENSORS['embedding']}")
    eos = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return ModelSpec(
        family=family.model_type,
        vocab_size=metadata.integer(f"{prefix}.vocab_size", embedding.shape[0]),
        hidden_size=hidden,
        intermediate_size=metadata.integer(f"{prefix}.feed_forward_length"),
        num_layers=metadata.integer(f"{prefix}.block_count", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=metadata.integer(f"{prefix}.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=metadata.integer(f"{prefix}.context_length"),
        rms_norm_eps=metadata.number(f"{prefix}.attention.layer_norm_rms_epsilon"),
        rope=_rope(file, metadata, prefix, head_dim),
        tie_embeddings=_MODEL_TENSORS["lm_head"] not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        sliding_window=metadata.optional_integer(f"{prefix}.attention.sliding_window") or None,
        eos_token_ids=tuple(dict.fromkeys(token for key in eos for token in metadata.token_ids(key))),
        bos_token_id=metadata.optional_integer("tokenizer.ggml.bos_token_id"),
    )


def _rope(file: GgufFile, metadata: Fields, prefix: str, head_dim: int) -> RopeSpec:
    theta = metadata.number(f"{prefix}.rope.freq_base", 10000.0)
    kind = metadata.text(f"{prefix}.rope.scaling.type", "linear")
    factors = None
    if _FREQUENCY_FACTORS in file.tensors:
        values = file.read(_FREQUENCY_FACTORS).float()
        if values.shape != (head_dim // 2,) or not bool((values.isfinite() & (values > 0)).all()):
            raise ModelError(f"{file.path}: {_FREQUENCY_FACTORS} must be {head_dim // 2} numbers above 0")
        factors = tuple(values.tolist())
    # Files from before `rope.scaling.*` have a linear scale only.
    factor = metadata.number(
        f"{prefix}.rope.scaling.factor", metadata.number(f"{prefix}.rope.scale_linear", 1.0)
    )
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeSpec(theta=theta, frequency_factors=factors)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor, frequency_factors=factors)
    if kind != "yarn" or theta <= 1:
        raise metadata.bad(f"{prefix}.rope.scaling.type", "none, linear or (with freq_base above 1) yarn")
    longest = metadata.integer(f"{prefix}.context_length")
    attention = metadata.number(
        f"{prefix}.rope.scaling.attn_factor", metadata.number(f"{prefix}.rope.scaling.yarn_attn_factor", 1.0)
    )
    return RopeSpec(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_position=metadata.integer(f"{prefix}.rope.scaling.original_context_length", longest),
        beta_fast=metadata.number(f"{prefix}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=metadata.number(f"{prefix}.rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention * (1 + 0.1 * math.log(max(factor, 1.0))),
        frequency_factors=factors,
    )


class GgufSource:
    """The tensors of a GGUF file, with q and k put into the order of the half-split rotation."""

    def __init__(self, file: GgufFile, family: Family, spec: ModelSpec) -> None:
        self.label = str(file.path)
        self.spec = spec
        self._file = file
        self._interleaved = family.gguf_interleaved

    def names(self) -> Collection[str]:
        return self._file.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[name].shape

    def check_type(self, name: str) -> None:
        self._file.check_type(self._file.tensors[name])

    def read(self, name: str) -> torch.Tensor:
        tensor = self._file.read(name)
        match = _INTERLEAVED.fullmatch(name) if self._interleaved else None
        if match is None:
            return tensor
        heads = self.spec.num_heads if match[1] == "q" else self.spec.num_kv_heads
        return half_split(tensor, heads)


def half_split(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of q or k, [heads * head_dim, ...], from rotation of neighbours (0,1), (2,3) … to halves.

    Within a head, even rows become its first half and odd rows its second.
    """
    pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
