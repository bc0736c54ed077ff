"""linear in plain torch; the contract stands in the package's docstring."""

from __future__ import annotations

import torch
from torch.nn import functional

from polybatch.kernels.linear.quantize import GROUP, Int4Weight, Int8Weight, quantize_activations


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x: [T, in] by weight: [out, in], in their common dtype."""
    return functional.linear(x, weight)


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """x: [T, in] rounded to 8 bits by an 8-bit weight; [T, out] in the dtype of x."""
    values, scales = quantize_activations(x)
    padded = functional.pad(weight.values, (0, values.shape[1] - weight.values.shape[1]))
    total = torch.zeros(x.shape[0], padded.shape[0], dtype=torch.float64, device=x.device)
    for g, inputs in enumerate(_groups(values.shape[1])):
        # Float64 holds every integer below 2**53, so these sums are those of integer arithmetic.
        dots = values[:, inputs].double() @ padded[:, inputs].double().T
        total += dots * scales[:, g : g + 1]
    return (total.float() * weight.scales).to(x.dtype)


def int4_linear(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """x: [T, in] rounded to 8 bits by a 4-bit weight; [T, out] in the dtype of x."""
    values, scales = quantize_activations(x, weight.group)
    total = torch.zeros(x.shape[0], weight.values.shape[0], dtype=torch.float64, device=x.device)
    for g, inputs in enumerate(_groups(values.shape[1], weight.group)):
        part = values[:, inputs].double()
        dots = part @ weight.values[:, inputs].double().T
        sums = part.sum(dim=1, keepdim=True)
        total += (dots * weight.scales[:, g] + sums * weight.mins[:, g]) * scales[:, g : g + 1]
    return total.to(x.dtype)


def _groups(num_in: int, group: int = GROUP) -> list[slice]:
    return [slice(start, start + group) for start in range(0, num_in, group)]
