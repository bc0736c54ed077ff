"""Adapters that change the vocabulary layers: their tokens' embeddings and logits, patched after the base's.

Rare and never in pages: an adapter brings the tables in host memory, and they are moved over when used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from polybatch.adapters.weights import AdapterWeights, VocabularyDelta

Segments = Sequence[Sequence[int]]
"""Rows (first token, last token + 1, index of the adapter)."""

Hosts = Sequence[AdapterWeights | None]


def hosts_of(digests: Sequence[str], adapters: Mapping[str, AdapterWeights]) -> Hosts:
    """Of each digest, the adapter if it changes a vocabulary layer. adapters: by digest."""
    found = [adapters.get(digest) for digest in digests]
    return [
        None if weights is None or (weights.embedding is None and weights.lm_head is None) else weights
        for weights in found
    ]


def patch_embeddings(x: torch.Tensor, token_ids: torch.Tensor, segments: Segments, hosts: Hosts) -> None:
    """Give tokens whose adapter changes the embedding theirs. x: [T, hidden], changed in place."""
    for start, stop, n in segments:
        adapter = hosts[n]
        if adapter is None or adapter.embedding is None:
            continue
        ids, rows = token_ids[start:stop], slice(start, stop)
        full, left, right = _parts(adapter.embedding, x.device)
        if full is not None:
            x[rows] = full[ids].to(x.dtype)
        if left is not None and right is not None:
            x[rows] = (x[rows].float() + left[ids] @ right).to(x.dtype)


def patch_logits(
    logits: torch.Tensor, x: torch.Tensor, logit_rows: torch.Tensor, segments: Segments, hosts: Hosts
) -> None:
    """Change the logits of rows whose adapter changes the output head.

    logits: [L, vocab] float32, changed in place. x: [L, hidden], the normalised rows. logit_rows: [L], the
    token of each.
    """
    for start, stop, n in segments:
        adapter = hosts[n]
        if adapter is None or adapter.lm_head is None:
            continue
        rows = (logit_rows >= start) & (logit_rows < stop)
        full, left, right = _parts(adapter.lm_head, x.device)
        if full is not None:
            logits[rows] = x[rows].float() @ full.T
        if left is not None and right is not None:
            logits[rows] += x[rows].float() @ right.T @ left.T


def _parts(delta: VocabularyDelta, device: torch.device) -> list[torch.Tensor | None]:
    """full, left and right on the device, float32."""
    parts = (delta.full, delta.left, delta.right)
    return [None if part is None else part.to(device, torch.float32) for part in parts]
