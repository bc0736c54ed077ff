"""Random adapters saved by peft, prompts that share prefixes, and executors that do something wrong."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import HFWeights, random_tokens, tiny_model
from peft import LoraConfig, get_peft_model

from polybatch.adapters.weights import AdapterWeights
from polybatch.engine.config import EngineConfig, ResolvedConfig
from polybatch.engine.executors import build_executor
from polybatch.engine.selfcheck import CheckRow, check
from polybatch.execution.executor import Executor
from polybatch.models.weights import ModelWeights
from polybatch.scheduling.plan import StepPlan

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

RECIPES: dict[str, dict[str, Any]] = {
    "small": {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 16, "use_rslora": True, "target_modules": "all-linear"},
    "dora": {"r": 5, "use_dora": True, "target_modules": [*ATTENTION, "down_proj"]},
    "patterns": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": [*ATTENTION, "up_proj"],
        "rank_pattern": {r"layers\.1\..*": 33, "q_proj": 1},
        "alpha_pattern": {"o_proj": 7},
        "layers_to_transform": [1],
    },
    "vocabulary": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
    "saved tables": {
        "r": 2,
        "target_modules": ["k_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "biases": {"r": 4, "bias": "all", "use_dora": True, "target_modules": ["k_proj", "v_proj"]},
}
"""Name -> what LoraConfig is told. "biases" needs a model with biases."""


def save_adapter(model: Any, path: Path, recipe: Mapping[str, Any], seed: int = 0) -> Path:
    """An adapter of peft for a copy of the model, with every trainable weight random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(dict(recipe)))
        wrapped = get_peft_model(copy.deepcopy(model), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = 0.15 * torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(parameter.abs() + 0.5 if "magnitude" in name else parameter + noise)
        wrapped.save_pretrained(str(path))
    return path


def save_adapters(model_name: str, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Adapters of these recipes for a tiny model; folder/<name>."""
    model = tiny_model(model_name)
    return {name: save_adapter(model, folder / name, RECIPES[name], seed) for seed, name in enumerate(names)}


@functools.cache
def tiny_weights(model_name: str) -> HFWeights:
    return HFWeights(tiny_model(model_name))


def prompts() -> list[list[int]]:
    """Five prompts of 11 to 75 tokens; three of them begin with the same 50.

    All end a few tokens before their last page of 16 does, so that every sequence soon needs another.
    """
    shared = random_tokens(50, seed=1)
    tails = [random_tokens(count, seed=2 + count) for count in (25, 9, 12)]
    return [random_tokens(11, seed=9), *(shared + tail for tail in tails), random_tokens(30, seed=8)]


def tiny_config(**settings: Any) -> EngineConfig:
    """Room for everything at once; the gate takes as much of it as it wants."""
    defaults = {"dtype": "float32", "max_model_len": 128, "memory": "24MiB", "max_num_batched_tokens": 128,
                "max_num_seqs": 64, "threads": 1}  # fmt: skip
    return EngineConfig(**{**defaults, **settings})


def run_gate(
    model_name: str, adapters: Mapping[str, Path], config: EngineConfig, **options: Any
) -> dict[tuple[str, str], CheckRow]:
    """(adapter, reference) -> row."""
    rows = check(tiny_weights(model_name), adapters, prompts(), config, max_tokens=8, **options)
    return {(row.adapter, row.reference): row for row in rows}


Spoil = Callable[[StepPlan, torch.Tensor], torch.Tensor]
SwapAdapters = Callable[[StepPlan, Mapping[str, AdapterWeights]], Mapping[str, AdapterWeights]]


class FaultyExecutor:
    """A real executor with one fault: in what it is given, or in what it returns."""

    def __init__(self, executor: Executor, swap: SwapAdapters | None, spoil: Spoil | None) -> None:
        self._executor, self._swap, self._spoil = executor, swap, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def forward(self, plan: StepPlan, adapters: Mapping[str, AdapterWeights]) -> torch.Tensor:
        given = adapters if self._swap is None else self._swap(plan, adapters)
        logits = self._executor.forward(plan, given)
        return logits if self._spoil is None else self._spoil(plan, logits.clone())


def build_faulty(swap: SwapAdapters | None = None, spoil: Spoil | None = None) -> Callable[..., Any]:
    def build(weights: ModelWeights, config: ResolvedConfig) -> Any:
        return FaultyExecutor(build_executor(weights, config), swap, spoil)

    return build
