"""lora: every token its own low-rank delta, of any rank, with rows gathered from pool pages.

Contract, for every variant:

    lora(x, y, memory, segments, table) -> None, y changed in place

    x: [T, in]; y: [T, out], the base layer's W x without its bias, same dtype as x
    memory: one layer's pool as one flat vector in the dtype of the adapter rows
    segments: [G, 3] int32, rows (first token, last token + 1, adapter index), disjoint; tokens that
        no segment covers have no adapter and keep their values bit for bit
    table: where the adapters' rows lie (`AdapterTable`)

    For each token t of adapter n, in float32, rounded once to the dtype of y:
        y[t] = gain[n] * (y[t] + sum over the rows r of n of (a_r . x[t]) * b_r) + bias[n]
    The base layer's bias is added after, to every token, so that the gain leaves it alone.

    Reads (in + out) * rank elements of the pool per segment.
Sources: LoRA (Hu et al. 2021); DoRA (Liu et al. 2024), the gain; Punica (Chen et al. 2023) for the
batch of many adapters; S-LoRA (Sheng et al. 2023) for paged rows.
"""

from polybatch.kernels.lora.reference import AdapterTable, lora

__all__ = ["AdapterTable", "lora"]
