"""rms_norm: scale each row by the inverse of its root mean square (Zhang and Sennrich 2019).

Contract, for every variant:

    rms_norm(x, weight, eps) -> [..., N], dtype of x

    x: [..., N], any float dtype; rows are independent of each other
    weight: [N]
    The mean and the division are float32 whatever the dtype of x; the result is rounded to the
    dtype of x before it is multiplied by the weight, as the checkpoints were trained.
    Reads and writes x once: 2 * x.nbytes.
"""

from polybatch.kernels.norm.reference import rms_norm

__all__ = ["rms_norm"]
