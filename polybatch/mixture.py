"""Several adapters on one request: their scaled sum, as if it were one adapter.

    y = W x + sum over i of scale_i * B_i (A_i x)

A sum of low-rank pairs is a low-rank pair whose rank is the sum of their ranks, so a mixture runs in the
shared batch like any adapter. It is known by a digest of its parts' digests and scales: whoever asks for the
same mixture, in whatever order and by whatever names, shares pages and cached prefixes. No torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from polybatch.errors import RequestError
from polybatch.request import AdapterRef

MAX_MIXED = 8
MAX_SCALE = 100.0


@dataclass(frozen=True, slots=True)
class Mixture:
    """Adapters by name, each with its scale; any order and any sign, every name once.

    Raises RequestError(field="adapter").
    """

    parts: SequenceOf[tuple[str, float]]

    def __post_init__(self) -> None:
        parts = tuple(self.parts)
        if not 1 <= len(parts) <= MAX_MIXED:
            raise RequestError(
                f"adapter mixes {len(parts)} adapters; it must be 1 to {MAX_MIXED}", field="adapter"
            )
        for part in parts:
            if not _is_pair(part) or not math.isfinite(part[1]) or abs(part[1]) > MAX_SCALE:
                raise RequestError(
                    f"adapter mixes in {str(part)[:80]}; it must be a name and a scale within "
                    f"{MAX_SCALE:g} of 0",
                    field="adapter",
                )
        names = [name for name, _ in parts]
        if len(set(names)) < len(names):
            raise RequestError(f"adapter mixes {names}, one of them twice: add its scales", field="adapter")
        object.__setattr__(self, "parts", tuple((name, float(scale)) for name, scale in parts))

    @property
    def name(self) -> str:
        return "+".join(f"{name}*{scale:g}" for name, scale in self.parts)


AdapterChoice = str | Mixture | SequenceOf[tuple[str, float]] | None
"""What a request may say: a name, a mixture, the pairs of one, or None for the base model."""


def choice_of(value: AdapterChoice) -> str | Mixture | None:
    """A choice with its pairs, if it has any, made a `Mixture`. Raises RequestError for anything else."""
    if value is None or isinstance(value, (str, Mixture)):
        return value
    if is_pairs(value):
        return Mixture(value)
    raise RequestError(
        f"adapter is {str(value)[:80]!r}; it must be a name, a Mixture, a list of (name, scale), or None",
        field="adapter",
    )


def is_pairs(value: Any) -> bool:
    """Whether this is one mixture, spelled as a list of (name, scale)."""
    return isinstance(value, (list, tuple)) and bool(value) and all(_is_pair(part) for part in value)


def mixed_ref(mixture: Mixture, get: Callable[[str], AdapterRef]) -> AdapterRef | None:
    """The adapter that a mixture is; None for the base model alone, where all scales are 0.

    get: an adapter by name, raises RequestError for an unknown one. A new mixture has `parts`, and its
    `num_pages` is not known until a store has made it.
    """
    scales: dict[str, float] = {}
    refs = {}
    for name, scale in mixture.parts:
        ref = get(name)
        refs[ref.digest] = ref
        scales[ref.digest] = scales.get(ref.digest, 0.0) + scale
    parts = tuple(sorted((digest, scale) for digest, scale in scales.items() if scale))
    if not parts:
        return None
    if len(parts) == 1 and parts[0][1] == 1:
        return refs[parts[0][0]]
    content = ";".join(f"{digest}*{scale.hex()}" for digest, scale in parts)
    return AdapterRef(mixture.name, hashlib.sha256(f"mixture {content}".encode()).hexdigest(), 0, parts)


def _is_pair(part: Any) -> bool:
    if not isinstance(part, (list, tuple)) or len(part) != 2 or not isinstance(part[0], str):
        return False
    return isinstance(part[1], (int, float)) and not isinstance(part[1], bool)


__all__ = ["AdapterChoice", "Mixture", "choice_of", "is_pairs", "mixed_ref"]
