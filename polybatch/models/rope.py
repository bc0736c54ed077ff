"""Frequencies of the rotary embedding and its length extensions, from a RopeSpec.

The arithmetic is float32 in the order that transformers uses, so that both agree to the last bit.
The rotation itself belongs to the executors.
Sources: RoFormer (Su et al. 2021); linear position interpolation (Chen et al. 2023); Llama 3.1's
band scaling; YaRN (Peng et al. 2023), section 3.
"""

from __future__ import annotations

import math

import torch

from polybatch.config import RopeSpec
from polybatch.errors import ModelError


def rope_frequencies(
    rope: RopeSpec, head_dim: int, max_position: int | None = None
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2], float32, and the factor on cos and sin.

    Position p turns pair i by p * inv_freq[i] radians; cos and sin are then multiplied by the factor,
    which is 1 for all kinds but yarn.
    max_position: stands in for rope.original_max_position where the checkpoint lacks it.
    Raises ModelError where llama3 or yarn know neither, or frequency_factors have the wrong length.
    """
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / wavelengths
    scaling = 1.0
    if rope.kind == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(inv_freq, rope, _original_length(rope, max_position))
    elif rope.kind == "yarn":
        inv_freq = _yarn(wavelengths, rope, head_dim, _original_length(rope, max_position))
        scaling = _yarn_attention_factor(rope)
    if rope.frequency_factors is not None:
        if len(rope.frequency_factors) != head_dim // 2:
            raise ModelError(
                f"the checkpoint has {len(rope.frequency_factors)} rope frequency factors; "
                f"head_dim {head_dim} needs {head_dim // 2}"
            )
        inv_freq = inv_freq / torch.tensor(rope.frequency_factors, dtype=torch.float32)
    return inv_freq, scaling


def _original_length(rope: RopeSpec, max_position: int | None) -> int:
    length = rope.original_max_position or max_position
    if length is None:
        raise ModelError(f"rope type {rope.kind} needs original_max_position_embeddings")
    return length


def _llama3(inv_freq: torch.Tensor, rope: RopeSpec, original: int) -> torch.Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended smoothly."""
    longest, shortest = original / rope.low_freq_factor, original / rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * scaled / rope.factor + smooth * scaled
    between = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(between, blended, scaled)


def _yarn(wavelengths: torch.Tensor, rope: RopeSpec, head_dim: int, original: int) -> torch.Tensor:
    """Pairs that turn often over the original length are kept, slow ones interpolated, a ramp between."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _yarn_attention_factor(rope: RopeSpec) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
