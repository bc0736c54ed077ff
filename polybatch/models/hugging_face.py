"""Hugging Face checkpoints: a directory, or a hub name that is fetched into the hub's own cache.

Only safetensors and JSON are read, never pickled weights or code. Tensors are mapped from the files
as they are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from polybatch.config import ModelSpec
from polybatch.errors import ModelError
from polybatch.models.checkpoint import CheckpointWeights, Locate
from polybatch.models.family import Family
from polybatch.models.fields import Fields
from polybatch.models.quantized_checkpoints import QuantizedSource, open_quantized
from polybatch.models.registry import find_family

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")
# Buffers that old versions saved; recomputed from the settings.
_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def open_directory(path: Path) -> CheckpointWeights:
    """Weights of a checkpoint directory, checked against its config.json.

    Raises ModelError for a file that is missing or malformed, or a model that is not supported.
    """
    config = read_fields(path / "config.json")
    family = find_family(config.text("model_type"), config.source)
    generation_path = path / "generation_config.json"
    generation = read_fields(generation_path) if generation_path.is_file() else Fields({}, config.source)
    spec = read_spec(family, config, generation)
    source = open_quantized(config, SafetensorsSource(path))

    def is_ignored(name: str) -> bool:
        empty_bias = isinstance(source, QuantizedSource) and source.is_empty_bias(name)
        return empty_bias or _is_ignored(name, family, spec)

    return CheckpointWeights(spec, source, locate_in(family), is_ignored)


def read_spec(family: Family, config: Fields, generation: Fields) -> ModelSpec:
    """The family's ModelSpec; raises ModelError for an architecture that is no causal language model."""
    named = config.texts("architectures") or []
    if named and family.architecture.lower() not in (name.lower() for name in named):
        raise config.bad("architectures", f"{family.architecture} for model_type {family.model_type}")
    return family.read_spec(config, generation)


def locate_in(family: Family) -> Locate:
    """Tensor names as Hugging Face checkpoints of this family spell them."""

    def locate(field: str, layer: int | None) -> str:
        if layer is None:
            return family.model_tensors[field]
        return f"model.layers.{layer}.{family.layer_tensors[field]}"

    return locate


def _is_ignored(name: str, family: Family, spec: ModelSpec) -> bool:
    # Some checkpoints with a tied head store the embedding a second time under the head's name.
    tied_head = spec.tie_embeddings and name == family.model_tensors["lm_head"]
    return tied_head or _BUFFER.fullmatch(name) is not None


def read_fields(path: Path) -> Fields:
    """A JSON file that holds a map; raises ModelError for anything else."""
    return Fields(read_json(path), str(path))


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        what = f"{path} does not exist: {path.parent} is no Hugging Face checkpoint"
        if (path.parent / "adapter_config.json").is_file():
            what += f", but an adapter: give it as --adapter NAME={path.parent}, beside its base model"
        raise ModelError(what) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object")
    return value


class SafetensorsSource:
    """The tensors of one safetensors file, or of the shards that an index names."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.files = _weight_files(path)
        self._open: dict[str, Any] = {}
        self._home: dict[str, str] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="pt")
                names: list[str] = list(handle.keys())  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError, ValueError) as error:
                raise ModelError(f"cannot read {file}: {error}") from error
            self._open[str(file)] = handle
            for name in names:
                if name in self._home:
                    raise ModelError(f"{path}: tensor {name} is in {file.name} and in {self._home[name]}")
                self._home[name] = str(file)

    def names(self) -> Collection[str]:
        return self._home.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def check_type(self, name: str) -> None:
        dtype = self.type_of(name)
        if dtype not in _DTYPES:
            raise ModelError(
                f"{self.label}: tensor {name} has the type {dtype}; supported are {', '.join(_DTYPES)}"
            )

    def type_of(self, name: str) -> str:
        """As safetensors spells it: "F16", "I32"."""
        return str(self._slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._open[self._home[name]].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        return self._open[self._home[name]].get_slice(name)


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if not (path / INDEX).is_file():
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pth"))
        why = "; pickled weights are never opened: convert them to safetensors" if pickled else ""
        raise ModelError(f"{path} holds neither {SINGLE} nor {INDEX}{why}")
    shards = read_json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{path / INDEX}: weight_map must map tensor names to file names")
    names = sorted(set(shards.values()))
    for name in names:
        # A shard lies beside its index; anything else would read files that the user did not name.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{path / INDEX}: {name!r} is no safetensors file of this directory")
        if not (path / name).is_file():
            raise ModelError(f"{path / name} does not exist, but {INDEX} names it: fetch it again")
    return [path / name for name in names]


_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
# Sub-folders hold other formats; consolidated files hold the same weights again.
_HUB_IGNORED = ["*/*", "consolidated*"]


def fetch(name: str, revision: str | None) -> Path:
    """Directory of a hub checkpoint, downloaded where the hub's cache lacks it.

    Honours HF_HUB_OFFLINE, HF_HOME and HF_TOKEN. Raises ModelError where it cannot be had.
    """
    from huggingface_hub import errors, snapshot_download

    # Old versions raise only OSError; new ones also their HTTP client's own kind.
    network: type[Exception] = getattr(errors, "HTTPError", OSError)
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED
            )
        )
    except errors.HFValidationError as error:
        raise ModelError(f"model {name!r} is neither a path nor a hub name (owner/name): {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {name!r} is not in the local cache and the hub cannot be reached: connect, unset "
            "HF_HUB_OFFLINE, or give the path of a checkpoint directory or GGUF file"
        ) from error
    except (OSError, network) as error:
        raise ModelError(f"cannot fetch model {name!r} from the hub: {error}") from error
