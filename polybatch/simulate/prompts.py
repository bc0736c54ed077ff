"""Token ids for requests that have none: distinct where prompts differ, cheap however long they are.

The scheduler looks at tokens only to find what prompts have in common, page by page from the first token on.
So one distinct token at the head of every block is enough: whatever follows hangs below it. The rest of a
block is one shared zero, which makes a prompt of 100,000 tokens a copy of pointers.
"""

from __future__ import annotations

from polybatch.simulate.traces import TraceRequest

_ZEROS = (0,) * 65536

STOP_TOKEN = 1
"""Ends an output whose true length the scheduler was not told."""

_FIRST_ID = 2


def prompt_tokens(request: TraceRequest, unique: int) -> tuple[int, ...]:
    """[num_input] token ids. unique: the request's number; equal blocks get equal ids in any request."""
    if not request.blocks:
        return (private_token(unique), *zeros(request.num_input - 1))
    tokens: list[int] = []
    left = request.num_input
    for block in request.blocks:
        size = min(request.block_tokens, left)
        tokens.append(_FIRST_ID + 2 * block)
        tokens += zeros(size - 1)
        left -= size
    return tuple(tokens)


def private_token(unique: int) -> int:
    """A token that only this request has; its outputs are made of it, so that they match nothing."""
    return _FIRST_ID + 1 + 2 * unique


def zeros(n: int) -> tuple[int, ...]:
    """n zeros."""
    return _ZEROS[:n] if n <= len(_ZEROS) else (0,) * n
