"""What a PEFT LoRA configuration says, checked: which modules it targets, with which rank and scaling.

Every key of the file is either honoured, known to matter in training only, or refused by name. Nothing
is ignored because it is unknown: a key that this version cannot place must hold an empty value.
Source: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024); module matching
follows peft 0.21.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybatch.adapters import patterns
from polybatch.errors import AdapterError

_MODULE_NAME = re.compile(r"\w+(\.\w+)*")
MAX_CONFIG_BYTES = 4 << 20
MAX_RANK = 1 << 16
MAX_LAYERS = 1 << 16

# Read below, each with its own check.
HONOURED = {
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "bias", "modules_to_save", "layers_to_transform", "layers_pattern",
    "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip
# Provenance, or of effect in training only. fan_in_fan_out concerns layers that store their weight
# [in, out]; peft sets it to False for the linear layers that these models have. velora_config changes
# the backward pass alone; the settings of initialisations matter only with those refused below.
NO_EFFECT = {
    "task_type", "inference_mode", "lora_dropout", "base_model_name_or_path", "revision", "auto_mapping",
    "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "runtime_config", "velora_config", "fan_in_fan_out",
}  # fmt: skip
UNSUPPORTED = {
    "alora_invocation_tokens": "adapters that start in mid-prompt (aLoRA)",
    "use_qalora": "QALoRA's pooled inputs",
    "layer_replication": "replicated layers",
    "lora_bias": "a bias inside the low-rank pair",
    "target_parameters": "adapters on bare parameters",
    "trainable_token_indices": "single trained token embeddings",
    "megatron_config": "Megatron layers",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA's truncated base weights",
    "use_bdlora": "block-diagonal pairs (BD-LoRA)",
    "monteclora_config": "Monte Carlo sampled pairs",
}
# Initialisations that leave the base weights alone. The others move part of W into the pair, so that the
# saved pair belongs to a changed W unless peft converted it while saving.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """A checked configuration. Module keys are paths in the base model ("model.layers.0.mlp.up_proj")."""

    r: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    use_rslora: bool
    use_dora: bool
    bias: str
    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str
    modules_to_save: tuple[str, ...]
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    ensure_weight_tying: bool
    base_model: str

    def rank(self, key: str) -> int:
        return int(_by_pattern(self.rank_pattern, key, self.r))

    def scaling(self, key: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank, alpha = self.rank(key), float(_by_pattern(self.alpha_pattern, key, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def saves(self, key: str) -> bool:
        """Whether `modules_to_save` names this module; such modules are never given a pair."""
        return any(f".{name}." in f".{key}." for name in self.modules_to_save)

    def targets(self, key: str) -> bool:
        """Whether peft would give this module a pair."""
        if isinstance(self.exclude_modules, str):
            if self.exclude_modules and patterns.reaches_end(self.exclude_modules, key):
                return False
        elif _names(self.exclude_modules, key):
            return False
        if self.saves(key) or self.target_modules is None:
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == "all-linear":
                return key not in ("lm_head", "model.embed_tokens")
            return patterns.reaches_end(self.target_modules, key)
        if key in self.target_modules:
            return True
        return _names(self.target_modules, key) and self._is_layer_transformed(key)

    def _is_layer_transformed(self, key: str) -> bool:
        if not self.layers_to_transform:
            return True
        named = [rf"(?:^|.*?\.){re.escape(p)}\.(?P<idx>\d+)\." for p in self.layers_pattern]
        for pattern in named or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if match := re.match(pattern, key):
                return int(match["idx"]) in self.layers_to_transform
        return False


def read_config(directory: Path) -> LoraConfig:
    """Read and check `adapter_config.json`.

    Raises AdapterError that names the key, its value and a way out.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(
            f"{directory} has no adapter_config.json; give the directory that peft's save_pretrained wrote"
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} holds {type(raw).__name__}; it must hold a JSON object")
    _check_keys(raw, path)
    return _parse(raw, path)


def _check_keys(raw: dict[str, Any], path: Path) -> None:
    if raw.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {raw.get('peft_type')!r}; only 'LORA' is supported")
    for key, value in raw.items():
        if key in HONOURED or key in NO_EFFECT or value in (None, False, "", [], {}):
            continue
        what = UNSUPPORTED.get(key, "it is unknown to this version and may change the result")
        raise AdapterError(
            f"{path}: {key} is {_short(value)}, which is not supported ({what}); remove it if unused"
        )
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, bool) and init is not None and init not in PLAIN_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights is {_short(init)}, whose pairs belong to changed base weights; save "
            "the adapter with path_initial_model_for_weight_conversion, which makes it a LoRA"
        )


class _Reader:
    """Typed reading of the file's values; each method raises AdapterError naming key and value."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def bad(self, name: str, value: object, limit: str) -> AdapterError:
        return AdapterError(f"{self.path}: {name} is {_short(value)}; it must be {limit}")

    def integer(self, name: str, value: object, limit: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
            raise self.bad(name, value, f"an integer from 0 to {limit:,}")
        return value

    def rank(self, name: str, value: object) -> int:
        if self.integer(name, value, MAX_RANK) == 0:
            raise self.bad(name, value, "at least 1")
        return self.integer(name, value, MAX_RANK)

    def number(self, name: str, value: object) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.bad(name, value, "a finite number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.bad(name, value, "true or false")
        return bool(value)

    def strings(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.bad(name, value, "a string or a list of strings")
        return tuple(value)

    def patterns(self, name: str) -> dict[str, Any]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            raise self.bad(name, value, "a map from module patterns to numbers")
        return value


def _parse(raw: dict[str, Any], path: Path) -> LoraConfig:
    read = _Reader(raw, path)
    layers = raw.get("layers_to_transform")
    layers = [] if layers is None else layers if isinstance(layers, list) else [layers]
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise read.bad("bias", raw["bias"], "none, all or lora_only")
    config = LoraConfig(
        r=read.rank("r", raw.get("r", 8)),
        alpha=read.number("lora_alpha", raw.get("lora_alpha", 8)),
        rank_pattern={k: read.rank(f"rank_pattern {k}", v) for k, v in read.patterns("rank_pattern").items()},
        alpha_pattern={
            k: read.number(f"alpha_pattern {k}", v) for k, v in read.patterns("alpha_pattern").items()
        },
        use_rslora=read.flag("use_rslora"),
        use_dora=read.flag("use_dora"),
        bias=raw.get("bias", "none"),
        target_modules=targets
        if isinstance(targets, str) or targets is None
        else read.strings("target_modules"),
        exclude_modules=excluded if isinstance(excluded, str) else read.strings("exclude_modules"),
        modules_to_save=read.strings("modules_to_save"),
        layers_to_transform=tuple(read.integer("layers_to_transform", i, MAX_LAYERS) for i in layers),
        layers_pattern=read.strings("layers_pattern"),
        ensure_weight_tying=read.flag("ensure_weight_tying"),
        base_model=str(raw.get("base_model_name_or_path") or ""),
    )
    _check_patterns(config, path)
    return config


def _check_patterns(config: LoraConfig, path: Path) -> None:
    found = [("rank_pattern", f"(.*\\.)?({p})") for p in config.rank_pattern]
    found += [("alpha_pattern", f"(.*\\.)?({p})") for p in config.alpha_pattern]
    for name in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, name), str):
            found.append((name, value))
    for name, pattern in found:
        try:
            patterns.check(pattern)
        except patterns.PatternError as error:
            raise AdapterError(
                f"{path}: {name} has {_short(pattern)}: {error}; list the modules by name instead"
            ) from error
    for name in ("layers_pattern", "modules_to_save"):
        for value in getattr(config, name):
            if not _MODULE_NAME.fullmatch(value):
                raise AdapterError(f"{path}: {name} has {_short(value)}; it must be a module's name")


def _by_pattern(values: dict[str, Any], key: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the key on a dot boundary."""
    for pattern, value in values.items():
        if patterns.reaches_end(rf"(.*\.)?({pattern})", key):
            return value
    return default


def _names(names: tuple[str, ...], key: str) -> bool:
    return any(key == name or key.endswith(f".{name}") for name in names)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
