"""Flags of live service that are more than a number."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import typer

from polybatch.config import SchedulerConfig
from polybatch.errors import ConfigError


def share_or_none(value: str | float) -> float | None:
    """A number, or None where `none` is given; for typer."""
    if str(value).lower() == "none":
        return None
    try:
        return float(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a number nor none") from None


def stage_times_of(given: Iterable[str]) -> dict[str, float]:
    """Mean seconds by kind of stage, of NAME=SECONDS and of JSON files with such a map.

    Raises ConfigError for anything else, a kind that is given twice, or a time that is not positive.
    """
    times: dict[str, float] = {}
    for text in given:
        found = _of_file(text) if text.endswith(".json") else _of_pair(text)
        for kind, seconds in found.items():
            if kind in times:
                raise ConfigError(f"--stage-times has {kind!r} twice: drop one")
            times[kind] = seconds
    SchedulerConfig(stage_times=tuple(times.items()))
    return times


def _of_pair(text: str) -> dict[str, float]:
    kind, _, seconds = text.rpartition("=")
    try:
        return {kind: float(seconds)}
    except ValueError:
        raise ConfigError(
            f"--stage-times is {text!r}; it must be NAME=SECONDS, or a file whose name ends in .json"
        ) from None


def _of_file(name: str) -> dict[str, float]:
    try:
        found = json.loads(Path(name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--stage-times {name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f'--stage-times {name} must hold a map such as {{"draft": 2.5}}')
    return found
