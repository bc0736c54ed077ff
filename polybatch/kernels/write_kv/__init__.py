"""write_kv: normalise heads where the model asks for it, rotate, and scatter into pages.

Contract, for every variant:

    write_kv(q, k, v, positions, slots, inv_freq, rope_scaling, kv_pages, *,
             q_norm=None, k_norm=None, eps=0.0) -> rotated q

    q: [T, H, D], k and v: [T, KH, D], one float dtype, not yet rotated
    positions: [T] int32, position of each token in its sequence
    slots: [T] int64, page * page_size + offset in the page; each at most once in a call
    inv_freq: [D / 2] float32, radians per position; rope_scaling: factor on sine and cosine
    kv_pages: one layer's pool, [num_pages, 2, KH, page_size, D] in the reference, changed in place;
        k and v are rounded to its dtype
    q_norm, k_norm: [D] weights of an RMS norm over each head before the rotation (Qwen3), or None

    Returns q normalised and rotated, [T, H, D] in its dtype. k and v are not changed.
    Raises EngineError if q, k and v disagree.
    Elements i and i + D / 2 of a head turn together (half-split, "NeoX" order), in float32.
    Reads and writes 2 * T * KH * D elements of keys and values.
Sources: RoFormer (Su et al. 2021); PagedAttention (Kwon et al. 2023), section 4.
"""

from polybatch.kernels.write_kv.reference import rotate, write_kv

__all__ = ["rotate", "write_kv"]
