"""ragged_attention: chunks of any length, each against its own sequence's paged keys and values.

Contract, for every variant:

    ragged_attention(q, kv_pages, page_table, cu_tokens, kv_lens, *, scale,
                     window=None, context_range=None) -> (out, lse)

    q: [T, H, D], already rotated; the chunk of sequence s is q[cu_tokens[s]:cu_tokens[s + 1]]
    kv_pages: one layer's pool. Its inner layout belongs to the executor; the reference reads
        [num_pages, 2, KH, page_size, D] with keys at 0 and values at 1. H is a multiple of KH,
        query head h reads key-value head h // (H // KH).
    page_table: [S, P] int32, page_table[s, j] holds positions j * page_size and on. Entries that no
        visible position needs are never followed.
    cu_tokens: [S + 1] int32, from 0 to T. kv_lens: [S] int32, tokens with KV, the chunk included:
        row i of a chunk of n rows has position kv_lens[s] - n + i.
    scale: factor on the dot products, usually D ** -0.5.
    window: tokens that a query sees, itself included, or None for all before it.
    context_range: [S, 2] int32 or None; restricts each sequence to key positions low <= p < high.

    out: [T, H, D] float32, so that partial results merge before they are rounded
    lse: [T, H] float32, natural logarithm of the sum of the exponentials of the scaled scores
    A row that sees no key has out = 0 and lse = -inf.

    Pool memory that no row sees may hold anything, NaN included.
    Reads 2 * KH * D * sum(kv_lens) elements of the pool once per chunk.

`merge_states` joins partial results over disjoint ranges into the result over their union, so a
prefix shared by many sequences, or one that lies elsewhere, can be attended apart.
Sources: PagedAttention (Kwon et al. 2023); online softmax (Milakov and Gimelshein 2018).
"""

from polybatch.kernels.ragged_attention.reference import merge_states, ragged_attention

__all__ = ["merge_states", "ragged_attention"]
