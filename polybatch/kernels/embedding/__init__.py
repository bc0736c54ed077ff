"""embedding: the table's row of each token, some of which only the device knows yet.

Contract, for every variant:

    embedding(token_ids, source, sampled, table) -> [T, N], dtype of the table

    token_ids: [T] int32; source: [T] int32, where >= 0 the token is sampled[source[t]] instead
    sampled: [any] int32, tokens that the step before chose
    table: [V, N]; every token is in [0, V)
    A step can so be launched before the host has seen what the step before it sampled.
"""

from polybatch.kernels.embedding.reference import embedding

__all__ = ["embedding"]
