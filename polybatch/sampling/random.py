"""Counter-based random numbers: a pure function of (seed, completion index, position).

There is no generator state to carry, so what a request was batched with, or whether it was
preempted, cannot change its numbers. Source: SplitMix64 (Steele, Lea, Flood 2014), whose output
function is a bijection of 64 bits with full avalanche; chaining it keys one input after another.
Not for cryptography.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
_MUL_1 = 0xBF58476D1CE4E5B9
_MUL_2 = 0x94D049BB133111EB


def mix(x: int) -> int:
    """SplitMix64's output function of one unsigned 64-bit integer."""
    x = (x + GOLDEN) & MASK
    x = ((x ^ (x >> 30)) * _MUL_1) & MASK
    x = ((x ^ (x >> 27)) * _MUL_2) & MASK
    return x ^ (x >> 31)


def mix_array(x: Words) -> Words:
    """`mix` of every element of a uint64 array; same bits."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MUL_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MUL_2)
    return x ^ (x >> np.uint64(31))


def stream(seed: int, index: int) -> int:
    """Key of one completion's random numbers; seed is any integer, taken modulo 2**64."""
    return mix(mix(seed & MASK) ^ (index & MASK))


def uniforms(streams: list[int], positions: list[int]) -> npt.NDArray[np.float64]:
    """One uniform number in [0, 1) per (stream, position), with 53 random bits; [len] float64."""
    keys = np.array(streams, dtype=np.uint64) ^ np.array(positions, dtype=np.uint64)
    bits = mix_array(keys) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
