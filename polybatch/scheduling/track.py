"""What the scheduler keeps about a sequence beside the sequence itself, worked out once at the door."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polybatch.memory.adapter_cache import ResidentAdapter
from polybatch.memory.prefix_tree import Node
from polybatch.request import Request, Sequence

if TYPE_CHECKING:
    from polybatch.scheduling.deadlines import Due
    from polybatch.scheduling.forecast import AdmissionAnswer

Key = tuple[float, ...]
"""A place in a policy's order; smaller goes first."""

BATCH_PRIORITY = 1 << 40
"""`Request.priority` of rows of batches: after everything else, whatever the policy."""


class Track:
    """A live sequence as the scheduler sees it.

    key: its place in the policy's order, unique. is_batch: a row of a batch; live requests go first.
    namespace: where its KV is cached, None for nowhere.
    is_scored: it needs logits for its prompt; `num_scored` prompt tokens have had theirs.
    capacity: tokens that its pages can hold. node: its deepest own page in the prefix tree.
    num_shared, salt: so many tokens, whole pages, are cached for everybody, the rest by a number of its own.
    adapter: held while it runs. held_by, held_until: it waits for that running sequence to compute so
    many tokens of their common prefix, so that they are not computed twice. due: when its tokens are due,
    None where nothing is promised. num_passed: admissions of others while it was first.
    num_expected: tokens of output. answer: what was predicted at its arrival.
    """

    __slots__ = (
        "adapter",
        "answer",
        "capacity",
        "due",
        "held_by",
        "held_until",
        "is_batch",
        "is_scored",
        "key",
        "max_len",
        "max_pages",
        "min_len",
        "namespace",
        "node",
        "num_expected",
        "num_passed",
        "num_scored",
        "num_shared",
        "salt",
        "seq",
        "stop_ids",
    )

    def __init__(self, seq: Sequence, key: Key, namespace: str | None, max_pages: int) -> None:
        request = seq.request
        self.seq = seq
        self.key = key
        self.is_batch = request.priority >= BATCH_PRIORITY
        self.namespace = namespace
        self.stop_ids = request.stop_token_ids
        self.min_len = seq.num_prompt + request.params.min_tokens
        self.max_len = seq.num_prompt + request.max_tokens
        self.max_pages = max_pages
        self.num_expected = num_expected(request)
        self.is_scored = request.params.prompt_logprobs is not None and seq.index == 0
        self.num_scored = 0
        self.capacity = 0
        self.num_shared = 0
        self.salt = 0
        self.node: Node | None = None
        self.adapter: ResidentAdapter | None = None
        self.held_by: Track | None = None
        self.held_until = 0
        self.due: Due | None = None
        self.num_passed = 0
        self.answer: AdmissionAnswer | None = None

    @property
    def cache_keys(self) -> list[int]:
        """By what the prefix tree knows its tokens: the tokens, but for the first one that is not shared.

        That one is told apart by the salt, and so is everything below it. Changed by nobody.
        """
        tokens, at = self.seq.tokens, self.num_shared
        if at == 0 or at >= len(tokens):
            return tokens
        return [*tokens[:at], self.salt | tokens[at], *tokens[at + 1 :]]

    @property
    def is_scoring(self) -> bool:
        """Whether prompt logits are still missing; then nothing may be read from the prefix tree."""
        return self.is_scored and self.num_scored < self.seq.num_prompt


def num_expected(request: Request) -> int:
    """Tokens of output that a request is expected to have."""
    expected = request.expected_tokens
    return request.max_tokens if expected is None else max(1, min(expected, request.max_tokens))


def salt_number(salt: str) -> int:
    """A salt as a number that a token id can be or-ed into: SHA-256, above the bits of token ids."""
    return int.from_bytes(hashlib.sha256(salt.encode()).digest()) << 32


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A snapshot: sequences, pages by what they hold, and running totals since the start."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_kv_pages: int
    num_adapter_pages: int
    num_cached_pages: int
    num_resident_adapters: int
    num_adapter_loads: int
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    num_preemptions: int
    num_prefill_tokens: int
    num_output_tokens: int
