"""The cost model: how long a step takes, from what it moves and computes. No torch.

    shape_of(plan) -> StepShape -> CostModel.predict -> seconds

A step's time is close to linear in a handful of amounts: the weights are read once whatever the batch (the
constant), each token is multiplied by them, each decoding row reads its context, each pair of a query and a
key is multiplied, each adapter that is live is read once. One hinge in the number of tokens stands for the
place where a step stops to wait for memory and starts to wait for arithmetic.
Source: the roofline model (Williams et al. 2009); linear step models as in Vidur (Agrawal et al. 2024).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields
from operator import attrgetter, itemgetter, mul
from typing import Protocol

from polybatch.scheduling.plan import Chunk, LogitRows, StepPlan


@dataclass(frozen=True, slots=True)
class StepShape:
    """What of a step costs time.

    num_tokens: new tokens of all chunks. num_decodes: chunks of one token, num_prefill_tokens: tokens of the
    others. decode_context: tokens of KV that the decoding rows read. prefill_pairs: pairs of query and key
    in the other chunks. num_logits: rows of logits. num_adapters, adapter_pages: distinct adapters of the
    chunks, adapter_tokens: tokens that have one. load_pages: pages of adapters that are loaded before it.
    num_prefills: chunks of more than one token, prefill_context: tokens of KV that they read.
    shared_context: of decode_context what another row of the step reads as well, but for the first reading.
    adapter_work: sum over tokens of the pages of their adapter. largest_adapter: pages of the largest.
    """

    num_tokens: int = 0
    num_decodes: int = 0
    num_prefill_tokens: int = 0
    decode_context: int = 0
    prefill_pairs: int = 0
    num_logits: int = 0
    num_adapters: int = 0
    adapter_pages: int = 0
    adapter_tokens: int = 0
    load_pages: int = 0
    num_prefills: int = 0
    prefill_context: int = 0
    shared_context: int = 0
    adapter_work: int = 0
    largest_adapter: int = 0


SHAPE_FIELDS = tuple(field.name for field in fields(StepShape))


class StepCosts(Protocol):
    """Whatever predicts a step: a fitted model, one that corrects itself, a table in a test."""

    @property
    def is_ready(self) -> bool:
        """Whether predictions are worth telling; a model that is learned is not from the first step on."""
        ...

    def predict(self, shape: StepShape) -> float:
        """Seconds of a step of this shape."""
        ...


MIN_SHARED_PAGES, MIN_SHARERS = 8, 3
"""A prefix so long, read by so many rows of a step, counts as shared; as the CUDA executor has it."""

_n_new, _start, _logits = attrgetter("n_new"), itemgetter(1), attrgetter("logits")
_adapter_pages = attrgetter("seq.adapter.num_pages")


def shape_of(plan: StepPlan, page_size: int = 16) -> StepShape:
    """The amounts of a planned step. O(chunks), some 0.1 us for one that is known to decode."""
    chunks = plan.chunks
    num_chunks, num_tokens = len(chunks), plan.num_decodes
    context = sum(map(_start, chunks)) + num_chunks
    num_logits = num_tokens
    num_prefills = prefill_tokens = prefill_context = pairs = 0
    for _, start, n_new, rows in chunks[plan.num_decodes :]:
        num_tokens += n_new
        if rows is not LogitRows.NONE:
            num_logits += 1 if rows is LogitRows.LAST else n_new
        if n_new != 1:
            num_prefills += 1
            prefill_tokens += n_new
            prefill_context += start + n_new
            context -= start + 1
            pairs += n_new * start + n_new * (n_new + 1) // 2
    adapter_tokens = adapter_work = 0
    if plan.resident:
        adapted = [chunk for chunk in chunks if chunk.seq.adapter is not None]
        counts = list(map(_n_new, adapted))
        adapter_tokens = sum(counts)
        adapter_work = sum(map(mul, counts, map(_adapter_pages, adapted)))
    page_counts = list(map(len, plan.resident.values()))
    num_decodes = num_chunks - num_prefills
    return StepShape(
        num_tokens,
        num_decodes,
        prefill_tokens,
        context,
        pairs,
        num_logits,
        len(plan.resident),
        sum(page_counts),
        adapter_tokens,
        sum(len(load.pages) for load in plan.loads) if plan.loads else 0,
        num_prefills,
        prefill_context,
        0 if num_decodes < MIN_SHARERS else _shared_context(chunks, page_size),
        adapter_work,
        max(page_counts, default=0),
    )


def _shared_context(chunks: tuple[Chunk, ...], page_size: int) -> int:
    """Tokens of KV that decoding rows read again, because another one has the same pages in front.

    Sequences whose page at one index is the same have all pages before it in common as well. A group counts
    with what all its members share; branches below that count nothing.
    """
    last = MIN_SHARED_PAGES - 1
    keys = [pages[last] for seq, _, n_new, _ in chunks if n_new == 1 and len(pages := seq.pages) > last]
    if len(keys) - len(set(keys)) < MIN_SHARERS - 1:
        return 0
    tables = [seq.pages for seq, _, n_new, _ in chunks if n_new == 1 and len(seq.pages) > last]
    groups: dict[int, list[list[int]]] = {}
    for key, pages in zip(keys, tables, strict=True):
        groups.setdefault(key, []).append(pages)
    total = 0
    for group in groups.values():
        if len(group) >= MIN_SHARERS:
            total += (len(group) - 1) * _num_common(group)
    return total * page_size


def _num_common(tables: list[list[int]]) -> int:
    """Leading pages that all tables have in common; at least MIN_SHARED_PAGES are."""
    low, high = MIN_SHARED_PAGES, min(map(len, tables)) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if len({pages[middle - 1] for pages in tables}) == 1:
            low = middle
        else:
            high = middle - 1
    return low


COEFFICIENTS = (
    "base", "per_token", "per_token_beyond", "per_decode", "per_context", "per_shared_context", "per_pair",
    "per_prefill", "per_prefill_context", "per_mixed", "per_head", "per_logit", "per_adapted", "per_adapter",
    "per_adapter_page", "per_largest_page", "per_adapter_token", "per_adapter_work", "per_load_page",
)  # fmt: skip
"""The linear coefficients of a `CostModel`, in the order of `amounts`."""

_coefficients = attrgetter(*COEFFICIENTS)


def amounts(
    shape: StepShape, hinge: int = 0, row_sizes: tuple[int, ...] = (), mixed_sizes: tuple[int, ...] = ()
) -> tuple[float, ...]:
    """What each coefficient is multiplied by; see `CostModel`."""
    tokens, prefills, logits = shape.num_tokens, shape.num_prefills, shape.num_logits
    sizes = mixed_sizes if prefills else row_sizes
    if sizes and tokens <= sizes[-1]:
        tokens = sizes[bisect_left(sizes, tokens)]
    shared, adapters = shape.shared_context, shape.num_adapters
    return (
        1,
        tokens,
        tokens - hinge if tokens > hinge else 0,
        shape.num_decodes,
        shape.decode_context - shared,
        shared,
        shape.prefill_pairs,
        prefills,
        shape.prefill_context,
        1 if prefills else 0,
        1 if logits else 0,
        logits,
        1 if adapters else 0,
        adapters,
        shape.adapter_pages,
        shape.largest_adapter,
        shape.adapter_tokens,
        shape.adapter_work,
        shape.load_pages,
    )


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds = base + sum of coefficient x amount, with a hinge in the number of tokens.

    All coefficients are seconds per unit and not negative. hinge: tokens from which on each costs
    `per_token_beyond` more. per_context: per token of KV that decoding rows read for the first time in the
    step, per_shared_context again. Once for a whole step where there is any: per_mixed for prefill,
    per_head for logits, per_adapted for adapters. row_sizes, mixed_sizes: decode steps, and those with
    prefill, are padded to the next of these (captured graphs); ascending, empty for none.
    """

    base: float
    per_token: float = 0.0
    hinge: int = 0
    per_token_beyond: float = 0.0
    per_decode: float = 0.0
    per_context: float = 0.0
    per_pair: float = 0.0
    per_logit: float = 0.0
    per_adapter: float = 0.0
    per_adapter_page: float = 0.0
    per_adapter_token: float = 0.0
    per_load_page: float = 0.0
    per_shared_context: float = 0.0
    per_prefill: float = 0.0
    per_prefill_context: float = 0.0
    per_mixed: float = 0.0
    per_head: float = 0.0
    per_adapted: float = 0.0
    per_adapter_work: float = 0.0
    per_largest_page: float = 0.0
    row_sizes: tuple[int, ...] = ()
    mixed_sizes: tuple[int, ...] = ()

    @property
    def is_ready(self) -> bool:
        return True

    def predict(self, shape: StepShape) -> float:
        """Seconds of a step of this shape."""
        counted = amounts(shape, self.hinge, self.row_sizes, self.mixed_sizes)
        found: float = sum(map(mul, _coefficients(self), counted))
        return found
