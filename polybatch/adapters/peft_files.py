"""The tensors of a PEFT adapter: found, named and measured from the header before any is read.

A file is sorted into one `Parts` per module of the base model. Pickled weights are refused: unpickling
runs code from the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from polybatch.adapters.peft_config import LoraConfig
from polybatch.config import ModelSpec
from polybatch.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING, LM_HEAD = "model.embed_tokens", "lm_head"
VOCABULARY = (EMBEDDING, LM_HEAD)
DTYPES = ("F32", "F16", "BF16")
MIN_LIMIT_BYTES = 1 << 30

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(self_attn|mlp)\.(\w+)")
# Suffix of a tensor's name -> part of its module. Weights and biases of a module that peft wrapped
# carry base_layer; those of modules_to_save, and of modules without a pair, do not.
_SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.bias": "bias",
    ".bias": "bias",
    ".base_layer.weight": "table",
    ".weight": "table",
}


@dataclass(slots=True)
class Parts:
    """Tensor names of one module by part; layer and module are None for the vocabulary tables."""

    key: str
    layer: int | None
    module: str | None
    tensors: dict[str, str] = field(default_factory=dict)

    @property
    def has_pair(self) -> bool:
        return "a" in self.tensors or "embedding_a" in self.tensors


class TensorFile:
    """An open safetensors file: shapes and dtypes from its header, tensors one at a time."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in handle.keys():  # noqa: SIM118 - the handle is not a mapping
            part = handle.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise AdapterError(
                    f"{path}: {name} is {part.get_dtype()}; save it as one of {', '.join(DTYPES)}"
                )
            self.shapes[name] = tuple(part.get_shape())

    def stored(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype, which may be a view of the mapped file: never keep it.

        Raises AdapterError if it is not finite.
        """
        tensor: torch.Tensor = self._handle.get_tensor(name)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{self.path}: {name} holds NaN or infinite values; the training diverged")
        return tensor

    def read(self, name: str) -> torch.Tensor:
        """The tensor in float32 and in memory of its own."""
        return self.stored(name).to(torch.float32, copy=True)


@contextmanager
def open_weights(directory: Path) -> Iterator[TensorFile]:
    """Open the adapter's safetensors file. Raises AdapterError if it is missing, pickled or malformed."""
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise AdapterError(
                f"{directory} has adapter_model.bin, a pickle, which can run code when read; load it with "
                "peft where you trust it and save it again with save_pretrained(..., safe_serialization=True)"
            )
        raise AdapterError(f"{directory} has no {WEIGHTS}; give the directory that save_pretrained wrote")
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield TensorFile(path, handle)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a readable safetensors file: {error}") from error


def sort_tensors(file: TensorFile, config: LoraConfig, spec: ModelSpec) -> dict[str, Parts]:
    """Every tensor of the file under its module; shapes checked against the base model, nothing read.

    Raises AdapterError for a tensor of no known module, of a wrong shape, or that the configuration denies,
    and for one that the configuration promises and the file lacks.
    """
    if not file.shapes:
        raise AdapterError(f"{file.path} holds no tensors")
    parts: dict[str, Parts] = {}
    for name in sorted(file.shapes):
        key, part = _split(name, file.path)
        if key not in parts:
            parts[key] = Parts(key, *_place(key, name, spec, file.path))
        if part in parts[key].tensors:
            raise AdapterError(
                f"{file.path}: {name} and {parts[key].tensors[part]} are the same weight twice"
            )
        parts[key].tensors[part] = name
    for item in parts.values():
        _check_parts(item, config, spec, file)
    _check_size(file, spec)
    _check_complete(parts, config, spec, file.path)
    return parts


def _check_size(file: TensorFile, spec: ModelSpec) -> None:
    """Refuse an adapter that would take more memory than the model it adapts."""
    linears = sum(out * in_ for out, in_ in spec.linear_shapes.values())
    model = spec.num_layers * linears + 2 * spec.vocab_size * spec.hidden_size
    size, limit = 4 * sum(map(math.prod, file.shapes.values())), max(MIN_LIMIT_BYTES, 4 * model)
    if size > limit:
        raise AdapterError(
            f"{file.path} takes {size:,} bytes in float32, the limit for this base model is {limit:,}: merge "
            "the adapter into the base model instead"
        )


def _split(name: str, path: Path) -> tuple[str, str]:
    """Tensor name -> (module path in the base model, part)."""
    if name.startswith(PREFIX):
        # Longest suffix first: ".base_layer.weight" before ".weight".
        for suffix in sorted(_SUFFIXES, key=len, reverse=True):
            if name.endswith(suffix):
                return name[len(PREFIX) : -len(suffix)], _SUFFIXES[suffix]
    raise AdapterError(f"{path}: tensor {name!r} is none that peft's LoRA writes for a causal language model")


def _place(key: str, name: str, spec: ModelSpec, path: Path) -> tuple[int | None, str | None]:
    """(layer, module) of a module path, (None, None) for the vocabulary tables."""
    if key in VOCABULARY:
        return None, None
    match = _LAYER.fullmatch(key)
    if match and match[3] in spec.linear_shapes and match[2] == _parent(match[3]):
        layer = int(match[1])
        if layer >= spec.num_layers:
            raise AdapterError(
                f"{path}: {name} is for layer {layer}; the base model has {spec.num_layers} layers: is this "
                "adapter for another base model?"
            )
        return layer, match[3]
    raise AdapterError(
        f"{path}: tensor {name!r} changes {key}; supported are {', '.join(spec.linear_shapes)}, embed_tokens "
        "and lm_head"
    )


def _parent(module: str) -> str:
    return "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"


def _check_parts(parts: Parts, config: LoraConfig, spec: ModelSpec, file: TensorFile) -> None:
    have = set(parts.tensors)
    where = f"{file.path}: {parts.key}"
    embedding = parts.key == EMBEDDING
    low_rank = {"embedding_a", "embedding_b"} if embedding else {"a", "b"}
    allowed = low_rank | {"magnitude"} | ({"table"} if parts.layer is None else {"bias"})
    if extra := have - allowed:
        raise AdapterError(
            f"{where} has {', '.join(parts.tensors[e] for e in sorted(extra))}, which is not supported there"
        )
    if have & low_rank and not low_rank <= have:
        raise AdapterError(f"{where} has only one half of its low-rank pair; the file is incomplete")
    if ("magnitude" in have) != (parts.has_pair and config.use_dora):
        raise AdapterError(
            f"{where} has {'a' if 'magnitude' in have else 'no'} lora_magnitude_vector, but use_dora is "
            f"{config.use_dora}"
        )
    if parts.has_pair and not _may_have_pair(parts.key, config, spec):
        raise AdapterError(f"{where} has a low-rank pair, but the configuration does not target it")
    if "bias" in have and config.bias == "none":
        raise AdapterError(f"{where} has a bias, but the configuration says bias none")
    for part, shape in _wanted_shapes(parts, config, spec).items():
        if part in have and file.shapes[parts.tensors[part]] != shape:
            raise AdapterError(
                f"{file.path}: {parts.tensors[part]} is {list(file.shapes[parts.tensors[part]])}; rank "
                f"{config.rank(parts.key)} and the base model want {list(shape)}: is it for another base "
                "model, or was the vocabulary resized?"
            )


def _may_have_pair(key: str, config: LoraConfig, spec: ModelSpec) -> bool:
    if config.target_modules is None or config.targets(key):
        return True
    tied = config.ensure_weight_tying and spec.tie_embeddings
    return tied and key == LM_HEAD and config.targets(EMBEDDING)


def _wanted_shapes(parts: Parts, config: LoraConfig, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    rank = config.rank(parts.key)
    if parts.module is not None:
        out, in_ = spec.linear_shapes[parts.module]
    elif parts.key == EMBEDDING:
        out, in_ = spec.hidden_size, spec.vocab_size
    else:
        out, in_ = spec.vocab_size, spec.hidden_size
    return {
        "a": (rank, in_), "b": (out, rank), "embedding_a": (rank, in_), "embedding_b": (out, rank),
        "magnitude": (out,), "bias": (out,), "table": (spec.vocab_size, spec.hidden_size),
    }  # fmt: skip


def _check_complete(parts: dict[str, Parts], config: LoraConfig, spec: ModelSpec, path: Path) -> None:
    keys = [
        f"model.layers.{i}.{_parent(module)}.{module}"
        for i in range(spec.num_layers)
        for module in spec.linear_shapes
    ]
    for key in (*keys, *VOCABULARY):
        part = parts.get(key)
        # With ensure_weight_tying, peft stores for lm_head what it stores for the embedding.
        source = EMBEDDING if key == LM_HEAD and config.ensure_weight_tying and spec.tie_embeddings else key
        targeted, saved = (test(key) or test(source) for test in (config.targets, config.saves))
        if targeted and not (part and part.has_pair):
            raise AdapterError(f"{path} lacks the low-rank pair of {key}, which the configuration targets")
        if key in VOCABULARY and saved and not (part and "table" in part.tensors):
            raise AdapterError(f"{path} lacks the table of {key}, which modules_to_save names")
