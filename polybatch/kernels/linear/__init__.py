"""linear: y = W x, in floating point or on small integers. Biases and adapters come after.

Contract, for every variant:

    linear(x, weight) -> [T, out], dtype of x
        x: [T, in]; weight: [out, in], dtype of x. The arithmetic is the dtype's own.

    int8_linear(x, weight: Int8Weight) -> [T, out], dtype of x
        Weights: symmetric, one scale per output channel. Activations: rounded at run time,
        symmetric, one scale per token and group of 32 inputs (`quantize_activations`).
            y[t, o] = scale[o] * sum_g x_scale[t, g] * sum_i xq[t, i] * q[o, i]
        where i runs over the inputs of group g.

    int4_linear(x, weight: Int4Weight) -> [T, out], dtype of x
        Weights: 16 levels between the minimum and the maximum of each group of consecutive inputs.
        Activations as for int8.
            y[t, o] = sum_g x_scale[t, g] * (scale[o, g] * dot[t, o, g] + min[o, g] * sum_i xq[t, i])
            dot[t, o, g] = sum_i xq[t, i] * q[o, i]

The sums over integers are exact, so a variant differs from the reference only where it adds the
groups' floats in another order. The quantisers are shared by all variants; only packing is theirs.

Sources: dynamic activations as in ZeroQuant (Yao et al. 2022) and LLM.int8 (Dettmers et al. 2022);
the 4-bit groups are those of GGUF's Q4_1, so such a checkpoint keeps its values.
"""

from polybatch.kernels.linear.quantize import (
    Int4Weight,
    Int8Weight,
    dequantize,
    quantize_activations,
    quantize_int4,
    quantize_int8,
)
from polybatch.kernels.linear.reference import int4_linear, int8_linear, linear

__all__ = [
    "Int4Weight",
    "Int8Weight",
    "dequantize",
    "int4_linear",
    "int8_linear",
    "linear",
    "quantize_activations",
    "quantize_int4",
    "quantize_int8",
]
