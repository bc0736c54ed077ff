"""What a step would take with so many more tokens, and how many fit in a given time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from polybatch.request import AdapterRef
from polybatch.scheduling.admission import PlanDraft
from polybatch.scheduling.costs import StepCosts, StepShape, shape_of
from polybatch.scheduling.plan import StepPlan
from polybatch.scheduling.track import Track

GRAIN_TOKENS = 32
"""Prefill is sized in multiples of this: matrix products come in tiles, and fewer guesses are needed."""


@dataclass(frozen=True, slots=True)
class Part:
    """Prefill that a step might carry: up to `rest` tokens from `start`."""

    start: int
    rest: int
    adapter: AdapterRef | None = None


def part_of(track: Track) -> Part:
    seq = track.seq
    return Part(seq.num_computed, seq.num_tokens - seq.num_computed, seq.adapter)


class StepTime:
    """Asks the cost model about steps that do not exist yet."""

    def __init__(self, costs: StepCosts, page_size: int) -> None:
        self.costs = costs
        self._page_size = page_size

    def shape(self, draft: PlanDraft) -> StepShape:
        """Of what is planned so far."""
        plan = StepPlan(tuple(draft.chunks), loads=tuple(draft.loads), resident=draft.resident)
        return shape_of(plan, self._page_size)

    def with_prefill(
        self, base: StepShape, parts: Iterable[Part], n: int, known: Iterable[str] = ()
    ) -> float:
        """Seconds with `n` tokens of these parts, in their order, beside what is planned.

        known: digests of adapters that are in the step already.
        """
        return self.costs.predict(_grown(base, parts, n, set(known)))

    def max_prefill(
        self, base: StepShape, parts: list[Part], limit_s: float, most: int, known: Iterable[str] = ()
    ) -> int:
        """The most tokens of these parts, at most `most`, with which the step stays within `limit_s`.

        0 if not even one grain fits. `most` itself is one of the sizes that are tried.
        """
        known = set(known)

        def fits(n: int) -> bool:
            return self.costs.predict(_grown(base, parts, n, known)) <= limit_s

        most = min(most, sum(part.rest for part in parts))
        if most <= 0 or fits(most):
            return max(most, 0)
        return GRAIN_TOKENS * _most_that(fits, most // GRAIN_TOKENS, GRAIN_TOKENS)

    def max_rows(self, base: StepShape, rows: list[Track], limit_s: float, known: Iterable[str] = ()) -> int:
        """How many of these decoding rows, from the first on, fit in the step within `limit_s`."""
        known = set(known)
        shapes = [base]
        digests = set(known)
        shape = base
        for row in rows:
            shape = _with_row(shape, row, digests)
            shapes.append(shape)

        def fits(n: int) -> bool:
            return self.costs.predict(shapes[n]) <= limit_s

        return len(rows) if fits(len(rows)) else _most_that(fits, len(rows))


def _most_that(fits: Callable[[int], bool], high: int, unit: int = 1) -> int:
    """The largest n below or at `high` with fits(n * unit), 0 if none; fits is monotone."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * unit):
            low = middle
        else:
            high = middle - 1
    return low


def _grown(base: StepShape, parts: Iterable[Part], n: int, known: set[str]) -> StepShape:
    """A shape with `n` more tokens of prefill."""
    left = n
    prefills = pairs = context = logits = adapters = pages = tokens = work = 0
    largest = 0
    new: set[str] = set()
    for part in parts:
        if left <= 0:
            break
        take = min(part.rest, left)
        left -= take
        prefills += 1
        pairs += take * part.start + take * (take + 1) // 2
        context += part.start + take
        logits += take == part.rest
        adapter = part.adapter
        if adapter is not None:
            tokens += take
            work += take * adapter.num_pages
            largest = max(largest, adapter.num_pages)
            if adapter.digest not in known and adapter.digest not in new:
                new.add(adapter.digest)
                adapters += 1
                pages += adapter.num_pages
    taken = n - max(left, 0)
    return StepShape(
        num_tokens=base.num_tokens + taken,
        num_decodes=base.num_decodes,
        num_prefill_tokens=base.num_prefill_tokens + taken,
        decode_context=base.decode_context,
        prefill_pairs=base.prefill_pairs + pairs,
        num_logits=base.num_logits + logits,
        num_adapters=base.num_adapters + adapters,
        adapter_pages=base.adapter_pages + pages,
        adapter_tokens=base.adapter_tokens + tokens,
        load_pages=base.load_pages,
        num_prefills=base.num_prefills + prefills,
        prefill_context=base.prefill_context + context,
        shared_context=base.shared_context,
        adapter_work=base.adapter_work + work,
        largest_adapter=max(base.largest_adapter, largest),
    )


def _with_row(base: StepShape, row: Track, digests: set[str]) -> StepShape:
    """A shape with one more row that decodes."""
    seq = row.seq
    adapter = seq.adapter
    is_new = adapter is not None and adapter.digest not in digests
    pages = 0 if adapter is None else adapter.num_pages
    if is_new and adapter is not None:
        digests.add(adapter.digest)
    return StepShape(
        num_tokens=base.num_tokens + 1,
        num_decodes=base.num_decodes + 1,
        num_prefill_tokens=base.num_prefill_tokens,
        decode_context=base.decode_context + seq.num_tokens,
        prefill_pairs=base.prefill_pairs,
        num_logits=base.num_logits + 1,
        num_adapters=base.num_adapters + is_new,
        adapter_pages=base.adapter_pages + pages * is_new,
        adapter_tokens=base.adapter_tokens + (adapter is not None),
        load_pages=base.load_pages,
        num_prefills=base.num_prefills,
        prefill_context=base.prefill_context,
        shared_context=base.shared_context,
        adapter_work=base.adapter_work + pages,
        largest_adapter=max(base.largest_adapter, pages),
    )
