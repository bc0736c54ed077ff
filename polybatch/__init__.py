"""Polybatch: an LLM inference engine whose batch may be heterogeneous in every way at once.

Names are imported when first used, so that `polybatch.request` and the scheduler need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polybatch.engine.llm import LLM
    from polybatch.errors import (
        AdapterError,
        ConfigError,
        EngineError,
        ModelError,
        PolybatchError,
        RequestError,
    )
    from polybatch.mixture import Mixture
    from polybatch.request import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams
    from polybatch.structured.spec import StructuredSpec

__version__ = "0.1.0"

_HOMES = {
    "LLM": "polybatch.engine.llm",
    "Mixture": "polybatch.mixture",
    "StructuredSpec": "polybatch.structured.spec",
    **dict.fromkeys(
        ("SamplingParams", "RequestOutput", "CompletionOutput", "FinishReason", "Logprob"),
        "polybatch.request",
    ),
    **dict.fromkeys(
        ("PolybatchError", "RequestError", "ConfigError", "ModelError", "AdapterError", "EngineError"),
        "polybatch.errors",
    ),
}

__all__ = [
    "LLM",
    "AdapterError",
    "CompletionOutput",
    "ConfigError",
    "EngineError",
    "FinishReason",
    "Logprob",
    "Mixture",
    "ModelError",
    "PolybatchError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredSpec",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polybatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
