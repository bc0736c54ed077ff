"""linear in plain torch; the contract stands in the package's docstring."""

from __future__ import annotations

import torch
from torch.nn import functional

from polybatch.kernels.linear.quantize import Int4Weight, Int8Weight, quantize_activations


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: [T, in] by weight: [out, in], in their common dtype."""
    return functional.linear(x, weight)


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x: [T, in] rounded to 8 bits by an 8-bit weight; [T, out] in the dtype of x."""
    values, scales = quantize_activations(x)
    # Float64 holds every integer below 2**53, so these sums are those of integer arithmetic.
    dots = values.double() @ weight.values.double().T
    return (dots.float() * scales[:, None] * weight.scales).to(x.dtype)


def int4_linear(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """x: [T, in] rounded to 8 bits by a 4-bit weight; [T, out] in the dtype of x."""
    values, scales = quantize_activations(x)
    total = torch.zeros(x.shape[0], weight.values.shape[0], dtype=torch.float64, device=x.device)
    for g in range(weight.scales.shape[1]):
        inputs = slice(g * weight.group, (g + 1) * weight.group)
        part = values[:, inputs].double()
        dots = part @ weight.values[:, inputs].double().T
        total += dots * weight.scales[:, g] + part.sum(dim=1, keepdim=True) * weight.mins[:, g]
    return (total.float() * scales[:, None]).to(x.dtype)
