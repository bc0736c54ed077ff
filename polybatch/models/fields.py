"""Checked reading of a checkpoint's settings, whether config.json or GGUF metadata.

Settings are somebody else's data: every value is checked for type and range where it is read, and
the error names the file, the key and the value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from polybatch.errors import ModelError

# Larger than any model; keeps a hostile file from making us count to 2^63.
MAX_SIZE = 2**31
MAX_LAYERS = 10_000


class Fields:
    """A map of settings with its origin. A key that is absent, or null, takes the default given."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        """The raw value, or None."""
        return self._values.get(key)

    def bad(self, key: str, limit: str) -> ModelError:
        """The error for a key whose value is not what it must be."""
        text = repr(self._values.get(key))
        if len(text) > 80:
            text = text[:80] + "…"
        return ModelError(f"{self.source}: {key} is {text}; it must be {limit}")

    def _required(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        value = default if value is None else value
        if value is None:
            raise ModelError(f"{self.source} lacks {key}: the file is incomplete")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """An integer from low to high; required where the default is None."""
        value = self._required(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(key, f"an integer from {low} to {high}")
        return value

    def optional_integer(self, key: str, *, low: int = 0, high: int = MAX_SIZE) -> int | None:
        return None if self._values.get(key) is None else self.integer(key, low=low, high=high)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0; required where the default is None."""
        value = self._required(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.bad(key, "a number")
        if not math.isfinite(value) or value <= 0:
            raise self.bad(key, "a finite number above 0")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self._values.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None where the key is absent."""
        value = self._values.get(key)
        if value is not None and (not isinstance(value, list) or not all(isinstance(v, str) for v in value)):
            raise self.bad(key, "a list of strings")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; empty where the key is absent."""
        value = self._values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < MAX_SIZE:
                raise self.bad(key, "a token id or a list of them")
        return tuple(ids)

    def section(self, key: str) -> Fields | None:
        """A nested map, or None where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(key, "a map")
        return Fields(value, f"{self.source}, {key}")

    def refuse_others(self, known: frozenset[str]) -> None:
        """Raise ModelError for a key that carries a value and is not known."""
        for key, value in self._values.items():
            if key not in known and value is not None:
                raise ModelError(
                    f"{self.source}: {key} is not supported; known keys are {', '.join(sorted(known))}"
                )
