"""Workload generators by name, each exact to its paper's description and seeded. No torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from polybatch.errors import ConfigError
from polybatch.simulate.traces import Trace
from polybatch.simulate.workloads.batchllm import batchllm
from polybatch.simulate.workloads.distserve import distserve
from polybatch.simulate.workloads.hexgen import hexgen
from polybatch.simulate.workloads.sarathi import sarathi
from polybatch.simulate.workloads.slora import slora

WORKLOADS: dict[str, Callable[..., Trace]] = {
    "slora": slora,
    "sarathi": sarathi,
    "distserve": distserve,
    "hexgen": hexgen,
    "batchllm": batchllm,
}


def make_workload(name: str, **options: Any) -> Trace:
    """Generate a workload. Raises ConfigError for a name or option that is not known."""
    known = _parameters(name)
    unknown = options.keys() - known.keys()
    if unknown:
        raise ConfigError(
            f"workload {name} has no parameter {sorted(unknown)[0]!r}; it has {', '.join(known)}: correct it"
        )
    return WORKLOADS[name](**options)


def options_of(name: str, pairs: Sequence[str]) -> dict[str, Any]:
    """Parameters from NAME=VALUE, typed as their defaults are; lists are comma-separated."""
    known = _parameters(name)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in known:
            raise ConfigError(
                f"--set is {pair!r}; it must be NAME=VALUE with a parameter of {name}: {', '.join(known)}"
            )
        default = known[key].default
        try:
            if isinstance(default, tuple):
                values[key] = tuple(type(default[0])(part) for part in text.split(","))
            else:
                values[key] = type(default)(text)
        except ValueError as error:
            raise ConfigError(
                f"{key} of workload {name} is {text!r}; it must be like its default, {default!r}"
            ) from error
    return values


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    if name not in WORKLOADS:
        raise ConfigError(f"workload is {name!r}; it must be one of {', '.join(WORKLOADS)}")
    return dict(inspect.signature(WORKLOADS[name]).parameters)
