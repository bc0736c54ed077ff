"""silu_mul: SiLU of the gate times the up projection (SwiGLU, Shazeer 2020).

Contract, for every variant:

    silu_mul(gate_up) -> [T, N], dtype of gate_up

    gate_up: [T, 2 N], gate first, any float dtype; what one fused projection of both wrote
    silu(g) = g / (1 + exp(-g)) is float32 and rounded to the dtype before it is multiplied by up, and the
    product is rounded again, as transformers computes it.
    Reads 2 * T * N elements, writes T * N.
"""

from polybatch.kernels.activation.reference import silu_mul

__all__ = ["silu_mul"]
