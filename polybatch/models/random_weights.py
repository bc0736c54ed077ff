"""Random weights in the shape of a model, for benchmarks and tests without a checkpoint.

`random:llama-3.1-8b` names a well-known configuration, `random:/path/config.json` a file. Every
tensor is drawn when it is asked for, from a seed of its own, so any order gives the same model.
A GPU draws billions of values in the time that a CPU needs for millions, so weights may be drawn there;
they are other values than the CPU's. There is no tokenizer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from polybatch.config import ModelSpec
from polybatch.errors import ModelError
from polybatch.models.checkpoint import CheckpointWeights, expected_tensors
from polybatch.models.fields import Fields
from polybatch.models.hugging_face import locate_in, read_json, read_spec
from polybatch.models.registry import find_family

# Values drawn per tensor at most; a prime, so that a repeat never lines up with a power-of-two row.
_MAX_DRAWN = 4_194_301
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "dtype": "bfloat16",
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "eos_token_id": 151645, "dtype": "bfloat16"}

CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    },
    "llama-3.1-8b": _LLAMA3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 8.0},
    },
    "llama-3.2-1b": _LLAMA3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "dtype": "bfloat16",
    },
    "qwen2.5-7b": _QWEN
    | {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
    },
    "qwen3-8b": _QWEN
    | {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
    },
}


def open_random(config: str, seed: int = 0, device: str = "cpu") -> tuple[CheckpointWeights, dict[str, Any]]:
    """Weights for a name of CONFIGS or the path of a config.json, and the settings they follow.

    device: where the tensors are drawn and lie. Raises ModelError for an unknown name or bad settings.
    """
    if config in CONFIGS:
        settings = CONFIGS[config]
    elif Path(config).is_file():
        settings = read_json(Path(config))
    else:
        raise ModelError(f"random:{config}: {config!r} is neither a file nor one of {', '.join(CONFIGS)}")
    fields = Fields(settings, f"random:{config}")
    family = find_family(fields.text("model_type"), fields.source)
    spec = read_spec(family, fields, Fields({}, fields.source))
    dtype = fields.text("dtype", fields.text("torch_dtype", "float32"))
    if dtype not in _DTYPES:
        raise fields.bad("dtype", ", ".join(_DTYPES))
    shapes = dict(expected_tensors(spec, locate_in(family)))
    source = RandomSource(fields.source, spec, shapes, _DTYPES[dtype], seed, device)
    return CheckpointWeights(spec, source, locate_in(family), lambda name: False), settings


class RandomSource:
    """Tensors drawn from a normal distribution whose width keeps activations and logits near 1."""

    def __init__(
        self,
        label: str,
        spec: ModelSpec,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.label = label
        self._spec = spec
        self._shapes = shapes
        self._dtype = dtype
        self._seed = seed
        self._device = torch.device(device)

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def check_type(self, name: str) -> None:
        """Every tensor is of a type that can be read."""

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        generator = torch.Generator(self._device).manual_seed(
            int.from_bytes(digest[:8], "little", signed=True)
        )
        num_values = math.prod(shape)
        # Drawing billions of values takes a CPU minutes; longer tensors repeat the drawn ones there.
        is_cpu = self._device.type == "cpu"
        num_drawn = min(num_values, _MAX_DRAWN) if is_cpu else num_values
        # Float32 drafts of the largest tables would not always fit beside a model that fills the GPU.
        draft = torch.float32 if is_cpu else self._dtype
        drawn = torch.empty(num_drawn, dtype=draft, device=self._device).normal_(generator=generator)
        if name.endswith("norm.weight"):
            return (1 + 0.1 * drawn).to(self._dtype)
        if name.endswith(".bias"):
            return (0.1 * drawn).to(self._dtype)
        # Unit logits from a normed hidden state need 1/sqrt(hidden), as every linear layer does; the
        # layers that write to the residual stream are narrowed so that their sum stays near 1.
        std = 1 / math.sqrt(shape[-1])
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * self._spec.num_layers)
        values = drawn.mul_(std).to(self._dtype)
        return values.repeat(-(-num_values // len(values)))[:num_values].reshape(shape)
